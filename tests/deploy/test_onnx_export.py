import json

import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from repopt_timm.deploy import QuantizationOptions, export_onnx, load_model, quantize_onnx, save_onnx
from repopt_timm.deploy.channel_health import still_channels
from repopt_timm.deploy.onnx_export import to_onnx
from repopt_timm.deploy.onnx_graph import image_input

from .conftest import ARGS

CONFIG = {'input_size': (3, 32, 32), 'mean': (0.5, 0.5, 0.5)}


def test_an_exported_file_gives_the_logits_of_pytorch_at_every_batch_size(checkpoint, tmp_path):
    path = tmp_path / 'model.onnx'
    found = export_onnx(checkpoint, path)
    assert found['difference'] < 1e-4 and found['bytes'] == path.stat().st_size
    model, session = load_model(checkpoint), onnxruntime.InferenceSession(path)
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 32, 32)
        (logits,) = session.run(None, {'input': images.numpy()})
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=0, atol=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ['model.onnx']
    # Paths of this machine.
    assert b'site-packages' not in path.read_bytes()
    facts = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert facts['architecture'] == 'test_repopt_vgg'
    assert all(facts[name] == getattr(ARGS, name) for name in ('input_size', 'mean', 'crop_pct'))


def test_channels_that_hardly_changed_in_training_are_counted_beside_others():
    norms = nn.ModuleDict({name: nn.BatchNorm2d(4) for name in ('some', 'all small', 'healthy')})
    norms['some'].running_var[:2] = 1e-9
    norms['all small'].running_var[:] = 1e-9
    norms['healthy'].running_var[0] = 1e-4
    assert still_channels(norms) == {'some': 2}


def small(bias=0.0):
    last = nn.Linear(4, 3)
    last.bias.data.fill_(bias)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), last).eval()


def test_a_file_in_float16_takes_and_gives_float32():
    proto, difference = to_onnx(small(), CONFIG, half=True)
    assert 1e-7 < difference < 1e-2
    onnx.checker.check_model(proto)
    assert image_input(proto)[1] == [0, 3, 32, 32]
    types = {tensor.data_type for tensor in proto.graph.initializer if tensor.name.endswith('weight')}
    assert types == {onnx.TensorProto.FLOAT16}
    ends = (*proto.graph.input, *proto.graph.output)
    assert {value.type.tensor_type.elem_type for value in ends} == {onnx.TensorProto.FLOAT}


def test_an_opset_that_pytorch_does_not_write_is_an_error():
    with pytest.raises(ValueError, match='opset 7: '):
        to_onnx(small(), CONFIG, opset=7)


class SingularValues(nn.Module):
    def forward(self, x):
        return torch.linalg.svd(x)[1].sum(-1)


class ExportedWrongly(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) * (2 if torch.compiler.is_exporting() else 1)


class Cancelling(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(3072, 64, bias=False) for _ in range(2))
        self.second.weight.data = self.first.weight + 1e-6 * torch.randn(64, 3072)

    def forward(self, x):
        return self.first(x.flatten(1)) - self.second(x.flatten(1))


def test_a_difference_like_that_of_float32_from_float64_is_not_an_error():
    assert to_onnx(Cancelling(), CONFIG)[1] > 1e-3


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        (SingularValues(), 'SingularValues cannot be exported to ONNX: .*linalg_svd'),
        (ExportedWrongly(), 'differ from PyTorch'),
        (small(torch.nan), 'differ from PyTorch.* nan'),
    ],
)
def test_what_onnx_does_not_compute_as_pytorch_does_is_an_error(model, message):
    with pytest.raises(ValueError, match=message) as error:
        to_onnx(model, CONFIG)
    assert '\n' not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet18', 'repopt_mobileone_s0', 'repopt_repghostnet_050', 'repopt_fastvit_t8'])
def test_the_exporter_folds_every_batchnorm_and_int8_runs(name, images, tmp_path):
    model = timm.create_model(name, num_classes=3).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    proto, _ = to_onnx(model, CONFIG)
    assert 'BatchNormalization' not in {node.op_type for node in proto.graph.node}
    save_onnx(proto, tmp_path / 'model.onnx')
    done = quantize_onnx(tmp_path / 'model.onnx', images, QuantizationOptions(images=4))
    assert done.quantized.ByteSize() < 0.4 * proto.ByteSize()
