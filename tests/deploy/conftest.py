from argparse import Namespace

import pytest
import timm
import torch

from repopt_timm.deploy import QuantizationOptions, evaluation, int8_table, load_model, quantize_onnx, save_onnx
from repopt_timm.deploy.onnx_export import to_onnx
from repopt_timm.deploy.onnx_graph import Graph

from ..helpers import TINY, write_images

CLASSES = ('dark', 'grey', 'light')
# How a run on these images describes them.
ARGS = Namespace(
    input_size=[3, 32, 32], crop_pct=1.0, mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.2], interpolation='bilinear'
)


@pytest.fixture(autouse=True, scope='session')
def short_times():
    """Times each run at least 20 times, but not for a whole second."""
    with pytest.MonkeyPatch.context() as patch:
        short = evaluation.time_runs
        for module in (evaluation, int8_table):
            patch.setattr(module, 'time_runs', lambda run, seconds=0: short(run, 0))
        yield


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """Three classes of noise around different levels: 20 images of each for training, 12 for validation."""
    root = tmp_path_factory.mktemp('images')
    levels = {'dark': 60, 'grey': 110, 'light': 160}
    return write_images(root, {'train': 20, 'validation': 12}, levels, 40)


def trained(name, **kwargs):
    """A model that has learnt to tell these classes apart, so that its statistics and weights mean something."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **kwargs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (ARGS.mean, ARGS.std))
    targets = torch.arange(24) % 3
    for _ in range(25):
        pixels = 60 + 50 * targets.view(-1, 1, 1, 1) + 40 * torch.randn(24, 3, 32, 32)
        loss = torch.nn.functional.cross_entropy(model((pixels.clamp(0, 255) / 255 - mean) / std), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def write_checkpoint(model, path, **more):
    """Writes what the training command does, as far as others read it."""
    content = {'arch': model.pretrained_cfg['architecture'], 'state_dict': model.state_dict(), 'args': ARGS, **more}
    torch.save(content, path)
    return path


@pytest.fixture(scope='session')
def checkpoint(tmp_path_factory):
    """The checkpoint of a trained target model."""
    return write_checkpoint(trained(TINY), tmp_path_factory.mktemp('run') / 'last.pth.tar')


@pytest.fixture(scope='session')
def named(checkpoint):
    """That checkpoint with the names of the classes, as a run on a folder of images writes it."""
    content = torch.load(checkpoint, weights_only=False)
    path = checkpoint.with_name('named.pth.tar')
    torch.save({**content, 'label_names': ['dark', 'n02123045', 'light']}, path)
    return path


@pytest.fixture(scope='session')
def exported(checkpoint):
    """The same as an ONNX model."""
    model = load_model(checkpoint)
    return to_onnx(model, timm.data.resolve_model_data_config(model))[0]


@pytest.fixture(scope='session')
def onnx_file(exported, tmp_path_factory):
    path = tmp_path_factory.mktemp('onnx') / 'model.onnx'
    save_onnx(exported, path)
    return path


@pytest.fixture(scope='session')
def quantization(onnx_file, images):
    """Quantizes that model; each way once."""
    done = {}

    def make(**options):
        key = QuantizationOptions(**{'images': 20, **options})
        if key not in done:
            done[key] = quantize_onnx(onnx_file, images, key)
        return done[key]

    return make


@pytest.fixture(scope='session')
def damaged(exported, tmp_path_factory):
    """That model with what INT8 cannot stand: a channel that is always 0, and a weight of 300 that reads it."""
    graph = Graph(exported)
    rows, columns = (graph.kernels[layer] for layer in ('stages.1.0.conv', 'stages.1.1.conv'))
    rows[0, 5] = 0
    graph.biases['stages.1.0.conv'][5] = -1
    columns[0, 5, 5, 4] = 300
    path = tmp_path_factory.mktemp('damaged') / 'model.onnx'
    save_onnx(graph.model, path)
    return path
