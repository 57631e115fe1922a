import pytest

from repopt_timm.deploy import (
    QuantizationOptions,
    layer_sensitivity,
    plot_sensitivity,
    quantize_onnx,
    sensitivity_table,
)
from repopt_timm.deploy.onnx_graph import layers_of


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
    options = QuantizationOptions(images=10, weights='per-tensor')
    done = quantize_onnx(damaged, images / 'train' / 'grey', options)
    report = layer_sensitivity(done)
    assert not report['labelled']
    assert report['layers'][0]['layer'] == 'stages.1.1.conv'
    assert 'drop' not in report['layers'][0]


def test_layers_left_out_are_not_tried(quantization):
    layers = [row['layer'] for row in layer_sensitivity(quantization(exclude=('head.fc',)))['layers']]
    assert 'stem.conv' in layers
    assert 'head.fc' not in layers


def test_a_report_is_a_table_and_a_picture(report, tmp_path):
    lines = sensitivity_table(report, 3).splitlines()
    assert [line.split()[1] for line in lines[2:4]] == ['all', 'stages.1.1.conv']
    assert len(lines) == 6
    plot_sensitivity(report, tmp_path / 'picture.png')
    assert (tmp_path / 'picture.png').stat().st_size > 1000
