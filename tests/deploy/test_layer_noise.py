import numpy as np
import onnx
import pytest
from PIL import Image

from repopt_timm.deploy import QuantizationOptions, layer_report, plot_layers, quantize_onnx, save_onnx
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
    assert report['logits_snr_db'] == quantization().logits_snr_db


def test_weights_are_described(quantization):
    done = quantization()
    report = layer_report(done)
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in done.model.graph.initializer}
    assert [row['layer'] for row in report['layers']] == list(layers_of(done.model))
    for row in report['layers']:
        weight = arrays[f'{row["layer"]}.weight']
        assert (row['shape'], row['min'], row['max']) == (list(weight.shape), weight.min(), weight.max())
        assert row['std'] == pytest.approx(weight.std(), rel=1e-4)
        normal = (weight - weight.mean()) / weight.std()
        assert row['kurtosis'] == pytest.approx((normal**4).mean(), rel=1e-3)


def test_layers_left_in_float_have_no_noise(quantization):
    rows = layer_report(quantization(exclude=('head.fc',)))['layers']
    assert [row['layer'] for row in rows if 'weight_snr_db' not in row] == ['head.fc']


@pytest.fixture
def report_of(exported, images, tmp_path):
    """Makes the row of a layer whose kernel a function has changed."""

    def make(change, weights='per-channel'):
        graph = Graph(exported)
        change(graph.kernels['stages.1.0.conv'])
        save_onnx(graph.model, tmp_path / 'model.onnx')
        done = quantize_onnx(tmp_path / 'model.onnx', images, QuantizationOptions(weights=weights, images=8))
        return next(row for row in layer_report(done)['layers'] if row['layer'] == 'stages.1.0.conv')

    return make


def test_a_strong_channel_drowns_the_others_of_a_common_scale(report_of):
    def strengthen(kernel):
        kernel[0, 0] *= 100

    assert report_of(strengthen)['weak_channels_snr_db'] > 35
    assert report_of(strengthen, 'per-tensor')['weak_channels_snr_db'] < 10


def test_a_layer_without_any_weights_is_no_error(report_of):
    row = report_of(lambda kernel: kernel.fill(0))
    assert (row['weak_channels_snr_db'], row['kurtosis']) == (0, 0)


@pytest.mark.slow
def test_two_models_are_drawn_side_by_side(quantization, tmp_path):
    reports = {'one': layer_report(quantization())}
    plot_layers(reports, tmp_path / 'one.png')
    plot_layers({**reports, 'two': layer_report(quantization(exclude=('head.fc',)))}, tmp_path / 'two.png')
    assert Image.open(tmp_path / 'two.png').width > 1.5 * Image.open(tmp_path / 'one.png').width
