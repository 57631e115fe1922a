from itertools import product

import pytest

from repopt_timm.deploy import QuantizationOptions, compare_int8, comparison_table

WAYS = [*product(('minmax', 'percentile'), ('per-channel', 'per-tensor'))]


@pytest.fixture(scope='module')
def results(checkpoint, onnx_file, images):
    ways = [QuantizationOptions(images=12, calibration=calibration, weights=weights) for calibration, weights in WAYS]
    return compare_int8({'run': checkpoint, 'file': onnx_file}, images, ways, latency_batches=(1, 2))


def test_every_model_is_measured_in_every_way_and_has_a_row_for_each_granularity(results):
    found = [(row['model'], (row['calibration'], row['weights'])) for row in results['accuracy']]
    assert found == [*product(('run', 'file'), [('', 'float32'), *WAYS])]
    reference, first = results['accuracy'][:2]
    assert first['drop'] == reference['top1'] - first['top1']
    assert (results['settings']['validation_images'], results['settings']['calibration_images']) == (36, 12)
    lines = comparison_table(results).splitlines()
    assert '| model | weights | float32 | INT8 minmax | INT8 percentile |' in lines
    rows = [line.split(' | ') for line in lines if line.startswith('| run | per-')]
    assert [row[1] for row in rows] == ['per-channel', 'per-tensor']
    assert rows[0][3] == f'{first["top1"]:.2f} ({0 - first["drop"]:+.2f})'


def test_speed_is_measured_per_batch_size_and_stated_if_times_are_steady(results):
    found = [(row['model'], row['batch']) for row in results['latency']]
    assert found == [*product(('run', 'file'), (1, 2))]
    run, file = results['latency'][0], results['latency'][2]
    assert list(run['ms']) == ['pytorch', 'float32', 'per-channel', 'per-tensor']
    assert list(run['speedups']['per-channel']) == ['pytorch', 'float32']
    assert list(file['speedups']['per-channel']) == ['float32']
    for ratio, cell in ((2.0, '2.00x'), (None, '-')):
        table = comparison_table({**results, 'latency': [{**run, 'speedups': {'per-tensor': {'float32': ratio}}}]})
        assert f'| {cell} |' in table
        assert ('speed-ups are not stated' in table) is (ratio is None)


def test_what_equalizing_and_other_forms_do_is_a_row_each(damaged, images):
    ways = [
        QuantizationOptions(images=20, weights='per-tensor', equalize=equalize, target=target)
        for equalize, target in product((False, True), ('ort', 'tensorrt'))
    ]
    lines = comparison_table(compare_int8({'A': damaged}, images, ways, latency_batches=())).splitlines()
    assert '| model | equalized | target | weights | float32 | INT8 minmax |' in lines
    rows = [line.split(' | ') for line in lines if line.startswith('| A |')]
    assert [row[1:3] for row in rows] == [['', 'ort'], ['', 'tensorrt'], ['yes', 'ort'], ['yes', 'tensorrt']]
    drops = [float(row[5].split('(')[1].strip(') |')) for row in rows]
    assert max(drops[:2]) < -20 < -10 < min(drops[2:])
    assert any(line.startswith('A: ') for line in lines)
