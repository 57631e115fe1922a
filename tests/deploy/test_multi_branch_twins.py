"""Plain twins of timm's multi-branch networks on their way to INT8."""

import pytest
import timm

from repopt_timm.deploy import quantize_onnx, save_onnx
from repopt_timm.deploy.onnx_export import float_onnx
from repopt_timm.deploy.quantization import QuantizationOptions

from .conftest import trained, write_checkpoint

# A GhostNetV3 does not take images of 32 px.
NAMES = ('fastvit_t8', 'lcnetv2_small', 'mobileone_s0', 'repghostnet_050', 'repvit_m0_9')


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in NAMES if timm.is_model(name)])
def test_a_twin_of_each_family_is_exported_without_batchnorm_and_quantized(name, images, tmp_path):
    checkpoint = write_checkpoint(trained(f'repopt_{name}'), tmp_path / 'last.pth.tar')
    model = float_onnx(checkpoint)
    assert not [node for node in model.graph.node if node.op_type == 'BatchNormalization']
    save_onnx(model, tmp_path / 'model.onnx')
    done = quantize_onnx(tmp_path / 'model.onnx', images, QuantizationOptions(images=10))
    assert done.quantized.ByteSize() < 0.4 * model.ByteSize()
    assert done.agreement >= 50  # after 25 steps these are still near a tie
