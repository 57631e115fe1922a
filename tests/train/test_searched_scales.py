import csv

import pytest

from repopt_timm import Scales
from repopt_timm.train.command import main

from ..helpers import TINY, random_scales, tiny_model


def test_a_search_says_how_far_the_scales_moved(arguments, tmp_path, capsys):
    main(arguments('--epochs', '1', '--train-images', '20', model=f'{TINY}_hs'))
    assert 'The search left the scales where they started' in capsys.readouterr().err
    assert (tmp_path / 'run/scales.safetensors').exists()


@pytest.mark.parametrize(('scales', 'said'), [('near', True), ('far', False), ('initial', False)])
def test_a_training_says_if_its_scales_are_close_to_the_initial_values(arguments, tmp_path, capsys, scales, said):
    source = scales
    if scales != 'initial':
        near = Scales.initial(tiny_model())
        vectors = {m: {b: v * 1.01 for b, v in near[m].items()} for m in near}
        made = Scales(near.architecture, vectors, near.geometry, near.counts) if scales == 'near' else random_scales()
        source = str(tmp_path / 'scales.safetensors')
        made.save(source)
    main(arguments('--scales', source, '--epochs', '1'))
    assert (
        'close to the values that a search starts from: layer means moved by 1.0%' in capsys.readouterr().err
    ) == said


def test_the_times_of_epochs_are_beside_the_table_that_a_run_repeats(arguments, tmp_path):
    main(arguments('--scales', 'initial', '--epochs', '2'))
    rows = list(csv.DictReader((tmp_path / 'run/times.csv').open()))
    assert [row['epoch'] for row in rows] == ['1', '2'] and all(float(row['train_seconds']) > 0 for row in rows)
    assert 'seconds' not in (tmp_path / 'run/summary.csv').read_text()


def test_a_run_that_diverged_leaves_its_reason_until_it_goes_on(arguments, tmp_path):
    main(arguments('--scales', 'initial', '--epochs', '1'))
    changed = ['--scales', 'initial', '--epochs', '2', '--resume', '--override', '--log-interval', '1']
    with pytest.raises(ValueError, match='became non-finite'):
        main(arguments(*changed, '--lr', '1e20'))
    assert 'epoch 2 of 2 became non-finite' in (tmp_path / 'run/diverged.txt').read_text()
    main(arguments(*changed))
    assert not (tmp_path / 'run/diverged.txt').exists()
