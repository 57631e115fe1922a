import re
import shutil
from argparse import Namespace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from repopt_timm.deploy import QuantizationOptions, evaluate, layer_report, quantize, quantize_onnx, save_onnx
from repopt_timm.deploy import quantization as quantization_module
from repopt_timm.deploy.classifier import onnx_classifier
from repopt_timm.deploy.onnx_export import to_onnx
from repopt_timm.deploy.onnx_graph import layers_of
from repopt_timm.deploy.quantization import CALIBRATIONS, WEIGHTS
from repopt_timm.deploy.runtime import open_session


def constants(model):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def weight_scales(quantization):
    """Layer to the scales of its weights in the quantized model."""
    quantized = quantization.quantized
    producers = {node.output[0]: node for node in quantized.graph.node}
    nodes = {node.name: node for node in quantized.graph.node}
    found = {}
    for name, node in layers_of(quantization.model).items():
        producer = producers.get(nodes[node.name].input[1])
        if producer is not None:
            found[name] = constants(quantized)[producer.input[1]]
    return found


def logits(model, images):
    return onnx_classifier(model).run(images)


@pytest.mark.parametrize('weights', WEIGHTS)
@pytest.mark.parametrize('calibration', CALIBRATIONS)
def test_int8_is_small_and_nearly_the_same(weights, calibration, quantization):
    done = quantization(weights=weights, calibration=calibration)
    assert done.quantized.ByteSize() < 0.3 * done.model.ByteSize()
    images = torch.cat([batch for batch, _ in done.images.batches(range(60), 20, '')])
    first, second = logits(done.model, images), logits(done.quantized, images)
    assert not torch.equal(first, second)
    assert (first.argmax(1) == second.argmax(1)).float().mean() > 0.9
    assert (first - second).norm() < 0.2 * first.norm()


def test_weights_have_one_scale_or_one_per_channel(quantization):
    for scale in weight_scales(quantization(weights='per-tensor')).values():
        assert scale.shape == ()
    shapes = {name: scale.shape for name, scale in weight_scales(quantization(weights='per-channel')).items()}
    assert shapes['stem.conv'] == (16,)
    assert shapes['stages.3.0.conv'] == (128,)
    assert shapes['head.fc'] == (3,)


def test_every_layer_is_in_int8_but_those_left_out(quantization):
    done = quantization()
    layers = list(layers_of(done.model))
    assert layers[0] == 'stem.conv'
    assert layers[-1] == 'head.fc'
    assert list(weight_scales(done)) == layers
    without = quantization(exclude=('head.fc', 'stages.1.*'))
    assert [name for name in layers if name not in weight_scales(without)] == layers[2:4] + layers[-1:]
    assert not [name for name in weight_scales(quantization(exclude=('Conv',))) if name.endswith('.conv')]


def activation_ranges(quantization):
    """Scales of activations, in the order of the network."""
    values = constants(quantization.quantized)
    nodes = quantization.quantized.graph.node
    return np.array([values[node.input[1]] for node in nodes if node.op_type == 'QuantizeLinear'])


def test_percentiles_cut_ranges_off(quantization):
    whole = activation_ranges(quantization(calibration='minmax'))
    near = activation_ranges(quantization(calibration='percentile', percentile=99.9))
    far = activation_ranges(quantization(calibration='percentile', percentile=90.0))
    assert (near <= whole * 1.01).all()
    assert (far < near * 0.9).any()


def test_ranges_are_those_of_all_images_whatever_the_batches(onnx_file, images, monkeypatch):
    options = QuantizationOptions(images=30)
    found = []
    for batch in (7, 30):
        monkeypatch.setattr(quantization_module, '_CALIBRATION_BATCH', batch)
        found.append(activation_ranges(quantize_onnx(onnx_file, images, options)))
    np.testing.assert_allclose(*found, rtol=1e-6)


def test_a_disk_without_room_for_calibration_is_told(onnx_file, images, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: Namespace(free=1_000_000))
    with pytest.raises(OSError, match='has 1 MB left, but calibration writes 1 MB'):
        quantize_onnx(onnx_file, images, QuantizationOptions(images=1))


@pytest.mark.parametrize('batch', [1, 8])
def test_a_file_whose_batch_is_fixed_runs_that_many_images_at_once(exported, checkpoint, images, tmp_path, batch):
    model = type(exported)()
    model.CopyFrom(exported)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    save_onnx(model, tmp_path / 'fixed.onnx')
    done = quantize_onnx(tmp_path / 'fixed.onnx', images, QuantizationOptions(images=5))
    assert done.agreement() >= 80
    assert len(layer_report(done)['layers']) == len(layers_of(exported))
    assert evaluate(tmp_path / 'fixed.onnx', images)['top1'] == evaluate(checkpoint, images)['top1']


def test_the_same_seed_gives_the_same_file(onnx_file, images, quantization):
    first = quantization(seed=3)
    second = quantize_onnx(onnx_file, images, first.options)
    assert first.quantized.SerializeToString() == second.quantized.SerializeToString()
    assert list(quantization(seed=4).indices) != list(first.indices)
    assert not np.array_equal(activation_ranges(quantization(seed=4)), activation_ranges(first))


def test_weights_of_seven_bits_use_half_of_the_codes(quantization):
    def largest(done):
        return max(abs(array).max() for array in constants(done.quantized).values() if array.dtype == np.int8)

    assert largest(quantization()) == 127
    assert largest(quantization(reduce_range=True)) == 64


def test_preprocessing_stays_in_the_file(quantization):
    done = quantization()
    assert onnx_classifier(done.quantized).config == onnx_classifier(done.model).config
    assert onnx_classifier(done.quantized).config['mean'] == (0.5, 0.4, 0.3)


def test_the_float_model_is_left_alone(quantization, exported):
    assert quantization().model.SerializeToString() == exported.SerializeToString()


def test_a_quantized_model_is_not_quantized_again(quantization):
    done = quantization()
    with pytest.raises(ValueError, match='quantized already'):
        quantize(done.quantized, None, done.options)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'weights': 'per-layer'}, 'expected one of per-channel, per-tensor'),
        ({'calibration': 'mse'}, 'expected one of minmax, entropy, percentile'),
        ({'percentile': 0.999}, 'expected more than 50'),
        ({'images': 0}, 'needs at least one'),
        ({'target': 'tflite'}, 'expected one of ort, tensorrt'),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        QuantizationOptions(**options)


@pytest.mark.parametrize('exclude', [('stem.conv',), ('head.fc',), ('stages.1.*',)])
def test_onnx_runtime_leaves_excluded_layers_in_float_too(exclude, quantization):
    done = quantization(exclude=exclude, weights='per-tensor')
    images = torch.cat([batch for batch, _ in done.images.batches(range(60), 20, '')])
    exact = open_session(done.quantized, optimize=False).run(None, {'input': images.numpy()})[0]
    found = logits(done.quantized, images).numpy()
    assert np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact)


def test_a_layer_that_onnx_runtime_would_quantize_itself_is_refused(quantization):
    with pytest.raises(ValueError, match=r"'stages\.1\.0\.conv' alone cannot stay in float32"):
        quantization(exclude=('stages.1.0.conv',))


def test_a_layer_that_is_not_there_cannot_be_left_out(quantization):
    with pytest.raises(
        ValueError,
        match=r"exclude 'stages.9': no layer or operator has this name, expected one of stem.conv, stages.0.0.conv",
    ):
        quantization(exclude=('stages.9',))


def test_a_single_layer_is_offered_with_the_one_that_follows(quantization):
    with pytest.raises(ValueError, match=r"Exclude 'stages\.1\.0\.conv' and 'stages\.1\.1\.conv'\.") as error:
        quantization(exclude=('stages.1.0.conv',))
    quantization(exclude=tuple(re.findall(r"'(\S+)'", str(error.value).rpartition('Exclude')[2])))


@pytest.mark.parametrize('weights', WEIGHTS)
def test_the_form_for_tensorrt_is_symmetric_with_a_pair_for_each_layer(weights, quantization):
    done = quantization(weights=weights, target='tensorrt')
    nodes, values = done.quantized.graph.node, constants(done.quantized)
    rounding = [node for node in nodes if node.op_type == 'QuantizeLinear']
    restoring = [node for node in nodes if node.op_type == 'DequantizeLinear']
    # Each layer's input and weights, and nothing else, have a pair of their own.
    layers = layers_of(done.model)
    assert len(rounding) == len(restoring) == 2 * len(layers)
    assert [node.input[0] for node in restoring] == [node.output[0] for node in rounding]
    for node in rounding + restoring:
        assert values[node.input[2]].dtype == np.int8
        assert not values[node.input[2]].any()
    readers = [[node.op_type for node in nodes if pair.output[0] in node.input] for pair in restoring]
    assert all(found in (['Conv'], ['Gemm']) for found in readers)
    assert {values[node.input[0]].dtype for node in rounding if node.input[0] in values} == {np.dtype('float32')}
    assert all(values[node.input[2]].dtype == np.float32 for node in nodes if node.op_type in ('Conv', 'Gemm'))
    assert done.agreement() > 90
    report = layer_report(done)
    assert all(row['weight_snr_db'] > 15 and row['input_snr_db'] > 15 for row in report['layers'])


def test_a_model_in_float16_is_not_quantized(exported):
    model = type(exported)()
    model.CopyFrom(exported)
    model.graph.initializer[0].data_type = onnx.TensorProto.FLOAT16
    with pytest.raises(ValueError, match='in float16, expected float32'):
        quantize(model, None, QuantizationOptions())


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
    nodes = quantize_onnx(
        tmp_path / 'residual.onnx', images, QuantizationOptions(images=4, target='tensorrt')
    ).quantized.graph.node
    restored = {node.output[0] for node in nodes if node.op_type == 'DequantizeLinear'}
    readers = [node.op_type for node in nodes if restored.intersection(node.input)]
    assert sorted(readers) == ['Conv', 'Conv', 'Gemm']


def test_nodes_without_a_name_are_layers_too(exported, images, tmp_path):
    model = type(exported)()
    model.CopyFrom(exported)
    numbers = {tensor.name: str(number) for number, tensor in enumerate(model.graph.initializer)}
    for node in model.graph.node:
        node.name = ''
        node.input[:] = [numbers.get(name, name) for name in node.input]
    for tensor in model.graph.initializer:
        tensor.name = numbers[tensor.name]
    save_onnx(model, tmp_path / 'unnamed.onnx')
    done = quantize_onnx(tmp_path / 'unnamed.onnx', images, QuantizationOptions(images=4))
    assert len(layers_of(done.model)) == len(layers_of(exported)) > 1


def test_the_form_for_onnx_runtime_has_unsigned_activations_and_integer_biases(quantization):
    done = quantization()
    nodes, values = done.quantized.graph.node, constants(done.quantized)
    stored = {values[node.input[0]].dtype.name for node in nodes if node.input[0] in values}
    assert stored == {'int8', 'int32'}
    assert {values[node.input[2]].dtype.name for node in nodes if node.op_type == 'QuantizeLinear'} == {'uint8'}
