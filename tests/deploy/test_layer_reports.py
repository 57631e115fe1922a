import numpy as np
import onnx_ir
import pytest

from repopt_timm.deploy import QuantizationOptions, layer_report, layer_sensitivity, quantize_onnx
from repopt_timm.deploy.layer_reports import sensitivity_table
from repopt_timm.deploy.onnx_graph import layers_of


def column(done, key):
    return np.array([row[key] for row in layer_report(done)['layers']])


def test_a_bit_is_worth_six_decibels(quantization):
    eight, seven = (column(quantization(reduce_range=reduced), 'weight_snr_db') for reduced in (False, True))
    # The first layer has few weights to average over.
    np.testing.assert_allclose(eight - seven, 6, atol=1)
    assert np.mean(eight - seven) == pytest.approx(6, abs=0.3)


def test_noise_adds_up_along_the_network_and_layers_left_in_float_have_none(quantization):
    done = quantization(exclude=('head.fc',))
    *rows, last = layer_report(done)['layers']
    assert last.keys() == {'layer', 'operator', 'std', 'kurtosis'}
    assert rows[0]['accumulated_snr_db'] > rows[-1]['accumulated_snr_db'] + 5 > 15
    for row in rows:
        weight = onnx_ir.from_proto(done.model).graph.initializers[f'{row["layer"]}.weight'].const_value.numpy()
        assert row['kurtosis'] == pytest.approx(((weight - weight.mean()) ** 4).mean() / row['std'] ** 4, rel=1e-3)


def test_the_layer_that_int8_breaks_is_first(damaged, images):
    done = quantize_onnx(damaged, images, QuantizationOptions(images=20, weights='per-tensor'))
    ranking = layer_sensitivity(done)
    first, *others = ranking['layers']
    assert first['layer'] == 'stages.1.1.conv' and first['drop'] > 20
    assert {row['layer'] for row in ranking['layers']} == set(layers_of(done.model))
    assert all(row['kl'] < first['kl'] / 10 for row in others)
    assert (ranking['images'], ranking['labelled']) == (20, True) and ranking['int8']['drop'] > 20
    lines = sensitivity_table(ranking, 3).splitlines()
    assert [line.split()[1] for line in lines[2:4]] == ['all', 'stages.1.1.conv'] and len(lines) == 6


def test_without_labels_logits_are_compared(damaged, images):
    options = QuantizationOptions(images=10, weights='per-tensor', exclude=('head.fc',))
    ranking = layer_sensitivity(quantize_onnx(damaged, images / 'train' / 'grey', options))
    layers = [row['layer'] for row in ranking['layers']]
    assert layers[0] == 'stages.1.1.conv' and 'head.fc' not in layers
    assert not ranking['labelled'] and 'drop' not in ranking['layers'][0]
