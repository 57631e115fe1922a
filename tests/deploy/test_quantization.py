import re

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from repopt_timm.deploy import QuantizationOptions, evaluate, layer_report, quantize, quantize_onnx, save_onnx
from repopt_timm.deploy.classifier import onnx_classifier
from repopt_timm.deploy.onnx_export import to_onnx
from repopt_timm.deploy.onnx_graph import layers_of
from repopt_timm.deploy.quantization import CALIBRATIONS, WEIGHTS
from repopt_timm.deploy.runtime import open_session


def constants(model):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def nodes(model, operator):
    return [node for node in model.graph.node if node.op_type == operator]


def weight_scales(done):
    """Layer to the scales of its weights in the quantized model."""
    values = constants(done.quantized)
    found = {node.output[0]: values[node.input[1]] for node in nodes(done.quantized, 'DequantizeLinear')}
    layers = {name: f'{node.inputs[1].name}_DequantizeLinear_Output' for name, node in layers_of(done.model).items()}
    return {name: found[tensor] for name, tensor in layers.items() if tensor in found}


def activation_scales(done):
    """In the order of the network."""
    values = constants(done.quantized)
    return np.array([values[node.input[1]] for node in nodes(done.quantized, 'QuantizeLinear')])


def pixels(done):
    return torch.cat([batch for batch, _ in done.images.batches(done.indices, 20, '')])


def copied(model):
    copy = type(model)()
    copy.CopyFrom(model)
    return copy


@pytest.mark.parametrize('weights', WEIGHTS)
@pytest.mark.parametrize('calibration', CALIBRATIONS)
def test_int8_is_small_and_nearly_the_same(weights, calibration, quantization):
    done = quantization(weights=weights, calibration=calibration)
    assert done.quantized.ByteSize() < 0.3 * done.model.ByteSize()
    assert 90 < done.agreement <= 100
    assert 14 < done.logits_snr_db < 60


def test_weights_have_one_scale_or_one_per_channel(quantization):
    assert {scale.shape for scale in weight_scales(quantization(weights='per-tensor')).values()} == {()}
    shapes = {name: scale.shape for name, scale in weight_scales(quantization()).items()}
    assert (shapes['stem.conv'], shapes['stages.3.0.conv'], shapes['head.fc']) == ((16,), (128,), (3,))


def test_every_layer_is_in_int8_but_those_left_out(quantization):
    layers = list(layers_of(quantization().model))
    assert (layers[0], layers[-1]) == ('stem.conv', 'head.fc')
    assert list(weight_scales(quantization())) == layers
    without = weight_scales(quantization(exclude=('head.fc', 'stages.1.*')))
    assert [name for name in layers if name not in without] == layers[2:4] + layers[-1:]
    assert list(weight_scales(quantization(exclude=('Conv',)))) == ['head.fc']


def test_ranges_are_those_of_all_calibration_images(quantization):
    done = quantization()
    values = pixels(done)
    assert activation_scales(done)[0] == pytest.approx((values.max() - values.min()).item() / 255, rel=1e-5)


def test_percentiles_cut_ranges_off(quantization):
    whole, near, far = (
        activation_scales(quantization(calibration=calibration, percentile=percentile))
        for calibration, percentile in (('minmax', 99.9), ('percentile', 99.9), ('percentile', 90.0))
    )
    assert (near <= whole * 1.01).all()
    assert (far < near * 0.9).any()


@pytest.mark.parametrize('target', ['ort', 'tensorrt'])
def test_logits_are_not_rounded(target, quantization):
    found = open_session(quantization(target=target).quantized).run(
        None, {'input': torch.randn(300, 3, 32, 32).numpy()}
    )
    # INT8 has 256 values, among which the largest two of a photograph may be equal.
    assert len(np.unique(found[0])) > 600


def test_auto_takes_the_calibration_that_agrees_best_on_images_that_calibrated_nothing(quantization):
    done = quantization(calibration='auto', weights='per-tensor', percentile=60.0)
    tried = {name: quantization(calibration=name, weights='per-tensor', percentile=60.0) for name in CALIBRATIONS}
    assert set(done.judged).isdisjoint(done.indices) and len(done.judged) == len(done.indices)
    assert done.agreement == max(each.agreement for each in tried.values()) > tried['percentile'].agreement
    assert done.quantized == tried[done.options.calibration].quantized
    with pytest.raises(ValueError, match='Lower --images'):
        quantization(calibration='auto', images=60)


def test_a_bad_result_is_a_warning_with_a_next_step(quantization):
    assert not quantization().warnings()
    (line,) = quantization(calibration='percentile', percentile=60.0, weights='per-tensor').warnings()
    assert all(step in line for step in ('--calibration auto', '--equalize', 'per-channel', '--sensitivity'))


@pytest.mark.parametrize('batch', [1, 8])
def test_a_file_whose_batch_is_fixed_runs_that_many_images_at_once(exported, checkpoint, images, tmp_path, batch):
    model = copied(exported)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    save_onnx(model, tmp_path / 'fixed.onnx')
    done = quantize_onnx(tmp_path / 'fixed.onnx', images, QuantizationOptions(images=5))
    assert done.agreement >= 80
    assert len(layer_report(done)['layers']) == len(layers_of(exported))
    assert evaluate(tmp_path / 'fixed.onnx', images)['top1'] == evaluate(checkpoint, images)['top1']


def test_the_same_seed_gives_the_same_file(onnx_file, images, quantization):
    first, other = quantization(seed=3), quantization(seed=4)
    second = quantize_onnx(onnx_file, images, first.options)
    assert first.quantized.SerializeToString() == second.quantized.SerializeToString()
    assert list(other.indices) != list(first.indices)


def test_weights_of_seven_bits_use_half_of_the_codes(quantization):
    largest = [
        max(abs(values).max() for values in constants(done.quantized).values() if values.dtype == np.int8)
        for done in (quantization(), quantization(reduce_range=True))
    ]
    assert largest == [127, 64]


def test_preprocessing_stays_in_the_file_and_the_float_model_as_it_is(quantization, exported):
    done = quantization()
    assert onnx_classifier(done.quantized).config == onnx_classifier(done.model).config
    assert onnx_classifier(done.quantized).config['mean'] == (0.5, 0.4, 0.3)
    assert list(done.quantized.metadata_props) == list(exported.metadata_props)
    assert done.model.SerializeToString() == exported.SerializeToString()


@pytest.mark.parametrize(
    'options',
    [{'weights': 'per-layer'}, {'calibration': 'mse'}, {'percentile': 0.999}, {'target': 'tflite'}],
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        QuantizationOptions(**options)


def test_only_float32_is_quantized(quantization, exported):
    model = copied(exported)
    model.graph.initializer[0].data_type = onnx.TensorProto.FLOAT16
    for wrong, reason in ((model, 'in float16'), (quantization().quantized, 'quantized already')):
        with pytest.raises(ValueError, match=reason):
            quantize(wrong, b'', QuantizationOptions())


@pytest.mark.parametrize('exclude', [('stem.conv',), ('head.fc',), ('stages.1.*',)])
def test_onnx_runtime_leaves_excluded_layers_in_float_too(exclude, quantization):
    done = quantization(exclude=exclude, weights='per-tensor')
    exact = open_session(done.quantized, optimize=False).run(None, {'input': pixels(done).numpy()})[0]
    found = onnx_classifier(done.quantized).run(pixels(done)).numpy()
    assert np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact)


def test_a_layer_that_onnx_runtime_would_quantize_itself_is_refused_with_what_to_exclude_too(quantization):
    with pytest.raises(ValueError, match=r"Exclude 'stages\.1\.0\.conv' and 'stages\.1\.1\.conv'\.") as error:
        quantization(exclude=('stages.1.0.conv',))
    quantization(exclude=tuple(re.findall(r"'(\S+)'", str(error.value).rpartition('Exclude')[2])))
    with pytest.raises(ValueError, match=r"'stages.9': .* expected one of stem.conv, stages.0.0.conv"):
        quantization(exclude=('stages.9',))


@pytest.mark.parametrize('weights', WEIGHTS)
def test_the_form_for_tensorrt_is_symmetric_with_a_pair_for_each_layer(weights, quantization):
    done = quantization(weights=weights, target='tensorrt')
    values = constants(done.quantized)
    rounding, restoring = (nodes(done.quantized, f'{kind}Linear') for kind in ('Quantize', 'Dequantize'))
    # Each layer's input and weights, and nothing else, have a pair of their own.
    assert len(rounding) == 2 * len(layers_of(done.model))
    assert [node.input[0] for node in restoring] == [node.output[0] for node in rounding]
    for node in rounding + restoring:
        assert values[node.input[2]].dtype == np.int8
        assert not values[node.input[2]].any()
    layers = nodes(done.quantized, 'Conv') + nodes(done.quantized, 'Gemm')
    assert {node.output[0] for node in restoring} == {name for node in layers for name in node.input[:2]}
    assert all(values[node.input[2]].dtype == np.float32 for node in layers)
    assert {values[node.input[0]].dtype for node in rounding if node.input[0] in values} == {np.dtype('float32')}
    assert done.agreement >= 90
    assert all(row['weight_snr_db'] > 15 and row['input_snr_db'] > 15 for row in layer_report(done)['layers'])


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
    options = QuantizationOptions(images=4, target='tensorrt')
    found = quantize_onnx(tmp_path / 'residual.onnx', images, options).quantized
    restored = {node.output[0] for node in nodes(found, 'DequantizeLinear')}
    readers = [node.op_type for node in found.graph.node if restored.intersection(node.input)]
    assert sorted(readers) == ['Conv', 'Conv', 'Gemm']


def test_nodes_without_a_name_are_layers_too(exported, images, tmp_path):
    model = copied(exported)
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
    values = constants(done.quantized)
    stored = {values[node.input[0]].dtype.name for node in done.quantized.graph.node if node.input[0] in values}
    assert stored == {'int8', 'int32'}
    assert {values[node.input[2]].dtype.name for node in nodes(done.quantized, 'QuantizeLinear')} == {'uint8'}
