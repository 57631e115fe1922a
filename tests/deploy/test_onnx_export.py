import json
import math

import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from repopt_timm.deploy import export_onnx, load_model
from repopt_timm.deploy.classifier import image_input
from repopt_timm.deploy.onnx_export import to_onnx

from .conftest import ARGS, write_checkpoint

CONFIG = {'input_size': (3, 32, 32), 'mean': (0.5, 0.5, 0.5)}


def run(path, images):
    return torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {'input': images.numpy()})[0])


def test_an_exported_file_gives_the_logits_of_pytorch_at_every_batch_size(checkpoint, tmp_path):
    found = export_onnx(checkpoint, tmp_path / 'model.onnx')
    model = load_model(checkpoint)
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 32, 32)
        with torch.inference_mode():
            torch.testing.assert_close(run(tmp_path / 'model.onnx', images), model(images), rtol=0, atol=1e-4)
    assert found['difference'] < 1e-4
    assert found['bytes'] == (tmp_path / 'model.onnx').stat().st_size


def test_it_is_one_file_of_convolutions_that_tells_its_preprocessing(exported, onnx_file):
    assert [file.name for file in onnx_file.parent.iterdir()] == ['model.onnx']
    assert b'site-packages' not in onnx_file.read_bytes()
    operators = {node.op_type for node in exported.graph.node}
    assert operators == {'Conv', 'Relu', 'ReduceMean', 'Reshape', 'Gemm'}
    found = {entry.key: json.loads(entry.value) for entry in exported.metadata_props}
    assert found['architecture'] == 'test_repopt_vgg'
    assert {name: found[name] for name in ('input_size', 'mean', 'crop_pct')} == {
        name: getattr(ARGS, name) for name in ('input_size', 'mean', 'crop_pct')
    }


def small():
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(4, 3))
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize(
    'options',
    [
        {'half': True},
        *(pytest.param(each, marks=pytest.mark.slow) for each in ({'batch': 1}, {'batch': 3, 'opset': 21})),
    ],
)
def test_files_for_other_runtimes_are_verified_too(options):
    proto, difference = to_onnx(small(), CONFIG, **options)
    half = 'half' in options
    assert difference < (1e-2 if half else 1e-5)
    onnx.checker.check_model(proto)
    assert image_input(proto)[1] == [options.get('batch', 0), 3, 32, 32]
    types = {tensor.data_type for tensor in proto.graph.initializer if tensor.name.endswith('weight')}
    assert types == {onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT}
    assert proto.opset_import[0].version == options.get('opset', 18)
    ends = (*proto.graph.input, *proto.graph.output)
    assert {value.type.tensor_type.elem_type for value in ends} == {onnx.TensorProto.FLOAT}


@pytest.mark.slow
@pytest.mark.parametrize('opset', [9, 99])
def test_an_opset_that_the_exporter_does_not_write_is_an_error(opset):
    with pytest.raises(
        ValueError, match=rf'opset {opset}: torch .* wrote 18. Take that one, or another from 18 to \d\d'
    ):
        to_onnx(small(), CONFIG, opset=opset)


class SingularValues(nn.Module):
    def forward(self, x):
        return torch.linalg.svd(x)[1].sum(-1)


class ExportedWrongly(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) * (2 if torch.compiler.is_exporting() else 1)


def test_an_operator_that_onnx_has_not_is_named():
    with pytest.raises(ValueError, match=r'SingularValues cannot be exported to ONNX: .*linalg_svd') as error:
        to_onnx(SingularValues(), CONFIG)
    assert '\n' not in str(error.value)


class Cancelling(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(3072, 64, bias=False) for _ in range(2))
        self.second.weight.data = self.first.weight + 1e-6 * torch.randn(64, 3072)

    def forward(self, x):
        return self.first(x.flatten(1)) - self.second(x.flatten(1))


def test_a_difference_like_that_of_float32_from_float64_is_not_an_error():
    torch.manual_seed(0)
    assert to_onnx(Cancelling(), CONFIG)[1] > 1e-3


@pytest.mark.parametrize(
    ('half', 'blamed'), [(False, 'not finite, or PyTorch exports'), (True, 'too large for float16')]
)
def test_other_logits_than_those_of_pytorch_are_an_error(half, blamed):
    model = small() if half else ExportedWrongly()
    if half:
        model[-1].weight.data *= 1e9
    with pytest.raises(ValueError, match=f'differs from PyTorch.*{blamed}'):
        to_onnx(model, CONFIG, half=half)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet18', 'mobilenetv3_small_100', 'repopt_vgg_a0', 'repopt_mobileone_s0'])
def test_the_exporter_folds_every_batchnorm(name):
    model = timm.create_model(name, num_classes=3).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    proto, _ = to_onnx(model, CONFIG)
    assert 'BatchNormalization' not in {node.op_type for node in proto.graph.node}


def test_weights_that_are_not_finite_are_an_error(tmp_path):
    model = timm.create_model('test_resnet', num_classes=3)
    model.fc.bias.data[0] = math.nan
    with pytest.raises(ValueError, match=r'fc\.bias.*nan'):
        export_onnx(write_checkpoint(model, tmp_path / 'last.pth.tar'), tmp_path / 'model.onnx')
    assert not (tmp_path / 'model.onnx').exists()
