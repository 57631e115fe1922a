from itertools import product
from pathlib import Path

import pytest

from repopt_timm.deploy import QuantizationOptions, compare_int8, comparison_table, int8_table, save_onnx
from repopt_timm.deploy.int8_table import is_steady

WAYS = [*product((False, True), ('minmax', 'percentile'))]


@pytest.fixture(scope='module')
def results(checkpoint, damaged, images):
    ways = [
        QuantizationOptions('per-tensor', calibration, images=20, equalize=equalize) for equalize, calibration in WAYS
    ]
    return compare_int8({'run': checkpoint, 'file': damaged}, images, ways, latency_batches=(1, 2))


def test_every_model_is_measured_in_every_way(results):
    names = ('model', 'equalized', 'calibration')
    found = [tuple(row[name] for name in names) for row in results['accuracy'] if row['weights'] != 'float32']
    assert found == [(model, *way) for model, way in product(('run', 'file'), WAYS)]
    float32 = [row for row in results['accuracy'] if row['weights'] == 'float32']
    references = {row['model']: row['top1'] for row in float32 if not row['equalized']}
    assert all(row['drop'] == references[row['model']] - row['top1'] for row in results['accuracy'])
    assert (results['settings']['validation_images'], results['settings']['calibration_images']) == (36, 20)


def test_a_second_model_that_is_wrong_is_found_before_the_first_is_quantized(
    checkpoint, quantization, images, tmp_path, monkeypatch
):
    save_onnx(quantization().quantized, tmp_path / 'int8.onnx')
    monkeypatch.setattr(int8_table, 'quantize_in', lambda *args: pytest.fail('quantized'))
    for other, error in (('nowhere.onnx', FileNotFoundError), (tmp_path / 'int8.onnx', ValueError)):
        with pytest.raises(error, match=Path(other).name):
            compare_int8({'run': checkpoint, 'other': other}, images, [QuantizationOptions()])


def test_what_equalizing_does_is_a_row(results):
    lines = comparison_table(results).splitlines()
    assert '| model | weights | float32 | INT8 minmax | INT8 percentile |' in lines
    rows = [line.split(' | ') for line in lines if line.startswith('| file | per-tensor')][:2]
    assert [row[1] for row in rows] == ['per-tensor', 'per-tensor, equalized']
    plain, equalized = (float(row[3].split('(')[1].strip(')')) for row in rows)
    assert plain < -20 < -10 < equalized
    assert any(line.startswith('file: ') for line in lines)


def test_speed_is_measured_per_batch_size_and_stated_if_times_are_steady(results):
    assert [(row['model'], row['batch']) for row in results['latency']] == [*product(('run', 'file'), (1, 2))]
    run, file = results['latency'][1:3]
    assert list(run['ms']) == ['pytorch', 'float32', 'per-tensor'] and list(file['ms']) == ['float32', 'per-tensor']
    assert list(run['speedups']) == ['per-tensor']
    for ratio, cell in ((2.0, '2.00x'), (None, '-')):
        table = comparison_table({**results, 'latency': [{**run, 'speedups': {'per-tensor': ratio}}]})
        assert f'| {cell} |' in table and ('not steady' in table) is (ratio is None)
    assert is_steady([1.0] * 19 + [9.0]) and not is_steady([1.0] * 17 + [9.0] * 3)
