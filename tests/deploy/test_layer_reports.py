import json

import numpy as np
import onnx_ir
import pytest

from repopt_timm.deploy import (
    QuantizationOptions,
    layer_report,
    layer_sensitivity,
    plot_layers,
    plot_sensitivity,
    quantize_onnx,
    save_onnx,
    sensitivity_table,
)
from repopt_timm.deploy.onnx_graph import Graph, layers_of


def column(report, key):
    return np.array([row[key] for row in report['layers']])


def test_a_bit_is_worth_six_decibels(quantization):
    eight, seven = (
        column(layer_report(quantization(reduce_range=reduced)), 'weight_snr_db') for reduced in (False, True)
    )
    # The first layer has few weights to average over.
    np.testing.assert_allclose(eight - seven, 6, atol=1)
    assert np.mean(eight - seven) == pytest.approx(6, abs=0.3)


def test_noise_adds_up_along_the_network(quantization):
    report = layer_report(quantization())
    alone, accumulated = column(report, 'input_snr_db'), column(report, 'accumulated_snr_db')
    assert alone[0] == pytest.approx(accumulated[0], abs=0.1)
    assert (accumulated[1:] < alone[1:]).all()


def test_weights_are_described_and_layers_left_in_float_have_no_noise(quantization):
    done = quantization(exclude=('head.fc',))
    rows = layer_report(done)['layers']
    assert [row['layer'] for row in rows] == list(layers_of(done.model))
    assert [row['layer'] for row in rows if 'weight_snr_db' not in row] == ['head.fc']
    values = onnx_ir.from_proto(done.model).graph.initializers
    for row in rows:
        weight = values[f'{row["layer"]}.weight'].const_value.numpy()
        assert (row['shape'], row['min'], row['max']) == (list(weight.shape), weight.min(), weight.max())
        normal = (weight - weight.mean()) / row['std']
        assert row['kurtosis'] == pytest.approx((normal**4).mean(), rel=1e-3)


@pytest.mark.parametrize(('weights', 'factor'), [('per-channel', 100), ('per-tensor', 100), ('per-channel', 0)])
def test_a_strong_channel_drowns_the_others_of_a_common_scale(weights, factor, exported, images, tmp_path):
    graph = Graph(exported)
    graph.kernels['stages.1.0.conv'][0, : 1 if factor else None] *= factor
    save_onnx(graph.model, tmp_path / 'model.onnx')
    done = quantize_onnx(tmp_path / 'model.onnx', images, QuantizationOptions(weights=weights, images=8))
    row = layer_report(done)['layers'][2]
    assert row['layer'] == 'stages.1.0.conv'
    if factor:
        assert row['weak_channels_snr_db'] > 35 if weights == 'per-channel' else row['weak_channels_snr_db'] < 10
    else:
        # Without any weights.
        assert (row['weak_channels_snr_db'], row['kurtosis']) == (0, 0)


@pytest.fixture(scope='module')
def report(broken_by_int8):
    return layer_sensitivity(broken_by_int8)


def test_the_layer_that_int8_breaks_is_first(report, broken_by_int8):
    first, *others = report['layers']
    assert first['layer'] == 'stages.1.1.conv'
    assert first['drop'] > 20
    assert {row['layer'] for row in report['layers']} == set(layers_of(broken_by_int8.model))
    assert all(row['kl'] < first['kl'] / 10 for row in others)
    assert (report['images'], report['labelled']) == (20, True)
    assert report['int8']['drop'] > 20


def test_without_labels_logits_are_compared(damaged, images):
    options = QuantizationOptions(images=10, weights='per-tensor', exclude=('head.fc',))
    report = layer_sensitivity(quantize_onnx(damaged, images / 'train' / 'grey', options))
    assert not report['labelled']
    assert report['layers'][0].keys() == {'layer', 'operator', 'kl'}
    layers = [row['layer'] for row in report['layers']]
    assert layers[0] == 'stages.1.1.conv' and 'head.fc' not in layers


def test_reports_are_tables_and_pictures(report, quantization, tmp_path):
    lines = sensitivity_table(report, 3).splitlines()
    assert [line.split()[1] for line in lines[2:4]] == ['all', 'stages.1.1.conv']
    assert len(lines) == 6
    plot_sensitivity(report, tmp_path / 'sensitivity.png')
    layers = layer_report(quantization(exclude=('head.fc',)))
    plot_layers({'one': layers, 'two': json.loads(json.dumps(layers))}, tmp_path / 'layers.png')
    assert all((tmp_path / name).stat().st_size > 1000 for name in ('sensitivity.png', 'layers.png'))
