import copy
from dataclasses import replace

import numpy as np
import onnx_ir
import pytest
import torch
from torch import nn

from repopt_timm.deploy import QuantizationOptions, quantize_onnx, save_onnx
from repopt_timm.deploy.classifier import onnx_classifier
from repopt_timm.deploy.onnx_export import to_onnx
from repopt_timm.deploy.onnx_graph import layers_of
from repopt_timm.deploy.quantization import CALIBRATIONS
from repopt_timm.deploy.runtime import open_session


def nodes(done, *operators):
    return [node for node in onnx_ir.from_proto(done.quantized).graph if node.op_type in operators]


def constant(value):
    return value.const_value.numpy()


def weight_scales(done):
    """Layer to the scales of its weights, for each layer that is in INT8."""
    names = {node.name: name for name, node in layers_of(done.model).items()}
    sources = {names[node.name]: node.inputs[1].producer() for node in nodes(done, 'Conv', 'Gemm')}
    return {name: constant(source.inputs[1]) for name, source in sources.items() if source}


@pytest.mark.parametrize('calibration', CALIBRATIONS)
def test_int8_is_small_and_nearly_the_same(calibration, quantization):
    done = quantization(weights='per-tensor', calibration=calibration)
    assert done.quantized.ByteSize() < 0.3 * done.model.ByteSize()
    assert 90 < done.agreement <= 100
    assert 14 < done.logits_snr_db < 60
    assert set(done.judged).isdisjoint(done.indices) and len(done.judged) == 20
    everything = quantization(images=60)
    assert list(everything.judged) == list(everything.indices)


def test_layers_have_one_scale_or_one_per_channel_but_those_left_out(quantization):
    scales = weight_scales(quantization())
    layers = list(layers_of(quantization().model))
    assert list(scales) == layers
    assert (scales['stem.conv'].shape, scales['head.fc'].shape) == ((16,), (3,))
    assert {scale.shape for scale in weight_scales(quantization(weights='per-tensor')).values()} == {()}
    without = weight_scales(quantization(exclude=('head.fc', 'stages.1.*')))
    assert [name for name in layers if name not in without] == layers[2:4] + layers[-1:]
    assert list(weight_scales(quantization(exclude=('Conv',)))) == ['head.fc']


def pixels(done):
    return next(done.images.batches(done.indices, 20, ''))[0]


def test_ranges_are_those_of_all_calibration_images_or_a_percentile(quantization):
    scales = {
        name: constant(nodes(quantization(calibration=name), 'QuantizeLinear')[0].inputs[1]) for name in CALIBRATIONS
    }
    values = pixels(quantization())
    assert scales['minmax'] == pytest.approx((values.max() - values.min()).item() / 255, rel=1e-5)
    assert scales['percentile'] < scales['minmax']


@pytest.mark.parametrize('target', ['ort', 'tensorrt'])
def test_logits_are_not_rounded(target, quantization):
    found = onnx_classifier(quantization(target=target).quantized).run(torch.randn(300, 3, 32, 32))
    # INT8 has 256 values, among which the largest two of a photograph may be equal.
    assert len(found.unique()) > 600


@pytest.mark.parametrize('lacks', [False, True])
def test_on_a_processor_where_8_bits_overflow_a_warning_names_7_bits(lacks, quantization, monkeypatch):
    monkeypatch.setattr('repopt_timm.deploy.quantization.lacks_vnni', lambda: lacks)
    assert ('--reduce-range' in '\n'.join(quantization().warnings())) == lacks
    assert '--reduce-range' not in '\n'.join(quantization(reduce_range=True).warnings())


def test_noisy_logits_are_a_warning_even_if_the_classes_agree(quantization):
    done = replace(quantization(reduce_range=True), agreement=100.0, logits_snr_db=9.0)
    assert '9.0 dB' in '\n'.join(done.warnings()) and not replace(done, logits_snr_db=11.0).warnings()


def test_auto_takes_the_calibration_that_agrees_best(quantization):
    done = quantization(calibration='auto', weights='per-tensor')
    tried = {name: quantization(calibration=name, weights='per-tensor') for name in CALIBRATIONS}
    best = max(tried, key=lambda name: (tried[name].agreement, tried[name].logits_snr_db))
    assert done.options.calibration == best
    assert done.quantized == tried[best].quantized


def test_the_same_seed_gives_the_same_file_with_the_preprocessing_and_leaves_the_model(
    onnx_file, images, quantization, exported
):
    first = quantization(seed=3)
    assert quantize_onnx(onnx_file, images, first.options).quantized == first.quantized
    assert list(quantization().indices) != list(first.indices)
    assert first.model == exported
    assert list(first.quantized.metadata_props) == list(exported.metadata_props)


def test_a_file_states_the_preprocessing_that_it_was_calibrated_with(onnx_file, images):
    done = quantize_onnx(onnx_file, images, QuantizationOptions(images=9), overrides={'mean': (0.1, 0.2, 0.3)})
    assert list(onnx_classifier(done.quantized).config['mean']) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize('options', [{'weights': 'per-layer'}, {'calibration': 'mse'}, {'target': 'tflite'}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        QuantizationOptions(**options)


def test_onnx_runtime_leaves_excluded_layers_in_float_too_or_they_are_refused(quantization):
    for layer in ('stem.conv', 'head.fc', 'stages.1.*'):
        done = quantization(exclude=(layer,), weights='per-tensor')
        exact = open_session(done.quantized, optimize=False).run(None, {'input': pixels(done).numpy()})[0]
        found = onnx_classifier(done.quantized).run(pixels(done)).numpy()
        assert np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact)
    with pytest.raises(ValueError, match='alone'):
        quantization(exclude=('stages.1.0.conv',))


def test_the_form_for_tensorrt_is_symmetric_with_a_pair_for_each_layer(quantization):
    done = quantization(target='tensorrt')
    pairs = nodes(done, 'QuantizeLinear', 'DequantizeLinear')
    # Each layer's input and weights, and nothing else, have a pair of their own.
    assert len(pairs) == 4 * len(layers_of(done.model))
    assert all(constant(node.inputs[2]).dtype == np.int8 and not constant(node.inputs[2]).any() for node in pairs)
    for node in nodes(done, 'Conv', 'Gemm'):
        assert [value.producer().op_type for value in node.inputs[:2]] == ['DequantizeLinear'] * 2
        weight = node.inputs[1].producer().inputs[0].producer().inputs[0]
        assert constant(weight).dtype == constant(node.inputs[2]).dtype == np.float32
    assert done.agreement >= 90


def test_the_form_for_onnx_runtime_has_unsigned_activations_and_integer_biases(quantization):
    stored = [node.inputs[0].const_value for node in nodes(quantization(), 'DequantizeLinear')]
    assert {value.dtype.name for value in stored if value is not None} == {'INT8', 'INT32'}
    assert {constant(node.inputs[2]).dtype for node in nodes(quantization(), 'QuantizeLinear')} == {np.dtype('uint8')}


class Residual(nn.Module):
    """A block whose input is read by a layer and by a residual."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 8, 3, 4), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.fc((self.conv(x) + x).mean((2, 3)))


def test_for_tensorrt_a_residual_stays_in_float(images, tmp_path):
    save_onnx(to_onnx(Residual(), {'input_size': (3, 32, 32)})[0], tmp_path / 'residual.onnx')
    done = quantize_onnx(tmp_path / 'residual.onnx', images, QuantizationOptions(images=4, target='tensorrt'))
    readers = [user.op_type for node in nodes(done, 'DequantizeLinear') for user in node.successors()]
    assert sorted(readers) == ['Conv'] * 4 + ['Gemm'] * 2


def test_nodes_without_a_name_are_layers_too(exported, images, tmp_path):
    model = copy.deepcopy(exported)
    for node in model.graph.node:
        node.name = ''
    save_onnx(model, tmp_path / 'unnamed.onnx')
    done = quantize_onnx(tmp_path / 'unnamed.onnx', images, QuantizationOptions(images=4, exclude=('head.fc',)))
    assert len(weight_scales(done)) == len(layers_of(exported)) - 1
