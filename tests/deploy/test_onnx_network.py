import copy

import numpy as np
import onnx
import pytest
import torch

from repopt_timm.deploy.onnx_graph import constants_of
from repopt_timm.deploy.onnx_network import OnnxNetwork
from repopt_timm.deploy.runtime import open_session

BATCH = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def onnx_logits(model):
    return torch.from_numpy(open_session(model, optimize=False).run(None, {'input': BATCH.numpy()})[0])


def network_of(done, weight_bits=8):
    return OnnxNetwork(done.quantized, constants_of(done.model), weight_bits)


def shaken(network):
    """Moves all weights, as training does."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return network


def difference(first, second):
    return ((first - second).norm() / second.norm()).item()


def test_a_float_graph_computes_what_onnx_runtime_does(exported):
    assert difference(OnnxNetwork(exported)(BATCH), onnx_logits(exported)) < 1e-5


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'weights': 'per-tensor'},
        {'reduce_range': True},
        {'exclude': ('head.fc', 'stages.1.*')},
        {'target': 'tensorrt'},
    ],
    ids=str,
)
def test_a_quantized_graph_rounds_where_the_file_does(options, quantization):
    done = quantization(**options)
    assert difference(network_of(done)(BATCH), onnx_logits(done.quantized)) < 1e-5


def test_codes_that_belong_to_no_weight_are_named_with_what_to_do(quantization):
    with pytest.raises(
        ValueError, match=r"has the codes '.*_quantized', expected those of a weight .* another version"
    ):
        OnnxNetwork(quantization().quantized, {})


@pytest.mark.parametrize('weight_bits', [8, 4])
@pytest.mark.parametrize('target', ['ort', 'tensorrt'])
@pytest.mark.parametrize('weights', ['per-channel', 'per-tensor'])
def test_a_file_has_the_weights_that_were_trained(weight_bits, weights, target, quantization):
    done = quantization(weights=weights, target=target)
    network = shaken(network_of(done, weight_bits))
    written = network.write_to(done.quantized)
    onnx.checker.check_model(written)
    assert difference(network(BATCH), onnx_logits(written)) < 1e-5
    assert difference(onnx_logits(written), onnx_logits(done.quantized)) > 0.01


def test_weights_of_four_bits_have_fifteen_codes_and_stay_in_eight(quantization):
    done = quantization()
    codes = [
        array
        for name, array in constants_of(network_of(done, 4).write_to(done.quantized)).items()
        if name.endswith('.weight_quantized')
    ]
    assert len(codes) == 8
    assert {array.dtype for array in codes} == {np.dtype(np.int8)}
    assert {(array.min(), array.max()) for array in codes} == {(-7, 7)}


def test_a_range_of_four_bits_does_not_reach_for_the_one_large_weight(exported, quantization):
    done, name = quantization(), 'stages.1.1.conv.weight'
    floats = {**constants_of(done.model)}
    floats[name] = floats[name].copy()
    floats[name][:, 0, 0, 0] = 3 * np.abs(floats[name]).max()
    network = OnnxNetwork(done.quantized, floats, weight_bits=4)
    shares = network.get_buffer(f'{name}_share')
    assert shares.shape == (32,)
    assert (shares < 1).float().mean() > 0.9
    scale = constants_of(network.write_to(done.quantized))['stages.1.1.conv.weight_scale']
    np.testing.assert_allclose(scale, np.abs(floats[name]).max((1, 2, 3)) / 7 * shares.numpy(), rtol=1e-5)


def test_gradients_pass_straight_through_the_rounding(quantization):
    done = quantization()
    exact, rounded = OnnxNetwork(done.model), network_of(done)
    for network in (exact, rounded):
        network(BATCH).square().sum().backward()
    assert dict(rounded.named_parameters()).keys() == dict(exact.named_parameters()).keys()
    for name, parameter in rounded.named_parameters():
        expected = exact.get_parameter(name).grad
        assert torch.cosine_similarity(parameter.grad.flatten(), expected.flatten(), dim=0) > 0.9, name


def test_a_bias_fits_where_a_channel_is_next_to_dead(quantization):
    done = quantization()
    network = network_of(done)
    with torch.no_grad():
        network.get_parameter('stages.1.0.conv.weight')[3] = 1e-12
        network.get_parameter('stages.1.0.conv.bias')[3] = 0.5
    written = network.write_to(done.quantized)
    assert difference(network(BATCH), onnx_logits(written)) < 1e-5
    restored = constants_of(written)['stages.1.0.conv.bias_quantized'][3].item()
    assert restored * constants_of(written)['stages.1.0.conv.bias_quantized_scale'][3] == pytest.approx(0.5, rel=1e-5)


def test_an_operator_that_cannot_be_trained_is_named(exported):
    model = copy.deepcopy(exported)
    model.graph.node[1].op_type = 'Celu'
    with pytest.raises(ValueError, match='lacks the operators Celu'):
        OnnxNetwork(model)
