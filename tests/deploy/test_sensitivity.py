from dataclasses import replace

import pytest

from repopt_timm.deploy import keep_in_float, layer_sensitivity, plot_sensitivity, sensitivity, sensitivity_table
from repopt_timm.deploy.onnx_graph import layers_of
from repopt_timm.deploy.quantization import requantized_layers


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


def test_it_alone_stays_in_float32_with_the_neighbour_that_onnx_runtime_asks_for(report, broken_by_int8):
    chosen, found = keep_in_float(broken_by_int8, report, max_drop=5)
    assert found['kept'] == ['stages.1.1.conv', 'stages.2.0.conv']
    assert found['drop'] <= 5
    assert chosen.agreement() > 90
    nodes = {name: layers_of(chosen.model)[name].name for name in found['kept']}
    assert requantized_layers(chosen.quantized, nodes) == []
    assert chosen.options.exclude == tuple(found['kept'])


def test_nothing_stays_in_float32_without_need(quantization):
    done = quantization()
    chosen, found = keep_in_float(done, layer_sensitivity(done), max_drop=50)
    assert found['kept'] == []
    assert chosen is done


def test_a_drop_that_float32_in_all_layers_does_not_reach_is_refused(report, broken_by_int8):
    with pytest.raises(ValueError, match=r'with all \d+ layers in float32 it is still 0.00'):
        keep_in_float(broken_by_int8, report, max_drop=-1e-9)


def test_times_are_of_one_image_whatever_the_batch(quantization, monkeypatch):
    done = quantization()
    model = type(done.model)()
    model.CopyFrom(done.model)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    monkeypatch.setattr(sensitivity, 'alternate', lambda runs: {name: [[8.0] * 3] for name in runs})
    report = {'int8': {'drop': 0}, 'layers': []}
    assert keep_in_float(replace(done, model=model), report, 1)[1]['ms'] == 2000


def test_without_labels_logits_are_compared(broken_by_int8, monkeypatch):
    done = replace(broken_by_int8)
    monkeypatch.setattr(done.images, 'num_classes', 1)
    report = layer_sensitivity(done)
    assert not report['labelled']
    assert report['layers'][0]['layer'] == 'stages.1.1.conv'
    assert 'drop' not in report['layers'][0]
    with pytest.raises(ValueError, match='needs labels'):
        keep_in_float(done, report, max_drop=1)


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
