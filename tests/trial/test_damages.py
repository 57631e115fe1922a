import json

import pytest

from repopt_timm.cli import main

from .conftest import fake_run

SUMMARY, TIMES = 'runs/sgd/seed-1/summary.csv', 'runs/sgd/seed-1/times.csv'
FILES = ('trial.yaml', 'shared.yaml', 'networks.json', SUMMARY, TIMES)
CUTS = (lambda data: b'', lambda data: data[: len(data) // 2], lambda data: data[:-2], lambda data: b'\xff\xfe' + data)
EDITS = [
    ('trial.yaml', b'seeds:', b'sodas:'),
    ('trial.yaml', b'- 0\n', b'- zero\n'),
    ('trial.yaml', b'lrs:\n', b'lrs: 0\nothers:\n'),
    ('trial.yaml', b'reference: sgd', b'reference: none'),
    ('trial.yaml', b'\nlr: 0.1', b'\nlr: x'),
    ('trial.yaml', b'- repopt\n', b'- repot\n'),
    ('shared.yaml', b'\nepochs:', b'\nepoch:'),
    ('networks.json', b'"step_seconds": 0.1', b'"step_seconds": "fast"'),
    (SUMMARY, b'\n2,', b'\n3,'),
    (SUMMARY, b',52.25,', b',,'),
    (SUMMARY, b',52.25,', b',52,25,'),
    (TIMES, b'\n2,1.0', b'\n2,'),
    (TIMES, b'\n2,1.0', b'\n2,1.0,3'),
]


@pytest.fixture
def finished(trial):
    """The folder of a trial of two arms and two seeds."""
    made = trial('--arms', 'sgd', 'repopt', '--lr', '0.1', '--epochs', '4', '--seeds', '2')
    for arm in made.arms:
        for seed in (0, 1):
            fake_run(made.training(arm, seed, 0.1), 51.25 + seed)
    costs = {'parameters': 1, 'activations': 2, 'convolutions': 6, 'step_seconds': 0.1}
    (made.folder / 'networks.json').write_text(json.dumps({'sgd': costs, 'repopt': costs}, indent=2) + '\n')
    return made.folder


def test_whole_files_are_read_and_a_damaged_one_is_named(finished, capsys):
    assert main(['trial', '--report', str(finished)]) == 0 and '51.75' in capsys.readouterr().out
    whole = {name: (finished / name).read_bytes() for name in FILES}
    damages = [(name, cut(whole[name])) for name in FILES for cut in CUTS]
    damages += [(name, whole[name].replace(before, after)) for name, before, after in EDITS]
    for name, damaged in damages:
        assert damaged != whole[name]
        (finished / name).write_bytes(damaged)
        assert main(['trial', '--report', str(finished)]) == 1, damaged
        output = capsys.readouterr()
        assert output.out == '' and f"'{finished / name}'" in output.err and output.err.count('\n') == 1, damaged
        (finished / name).write_bytes(whole[name])
