import json

import pytest

from repopt_timm.cli import main

from .conftest import fake_run

SUMMARY, TIMES = 'runs/sgd/seed-1/summary.csv', 'runs/sgd/seed-1/times.csv'
FILES = ('trial.yaml', 'shared.yaml', 'networks.json', SUMMARY, TIMES)


@pytest.fixture
def finished(trial):
    """The folder of a trial of two arms and two seeds."""
    made = trial('--arms', 'sgd', 'repopt', '--lr', '0.1', '--epochs', '4', '--seeds', '2')
    for arm in made.settings.arms:
        for seed in (0, 1):
            fake_run(made.training(arm, seed, 0.1), 51.25 + seed)
    costs = {'parameters': 1, 'activations': 2, 'convolutions': 6, 'step_seconds': 0.1}
    (made.folder / 'networks.json').write_text(json.dumps({'sgd': costs, 'repopt': costs}, indent=2) + '\n')
    return made.folder


def report(folder, capsys):
    code = main(['trial', '--report', str(folder)])
    return code, capsys.readouterr()


CUTS = {
    'empty': lambda text: text[:0],
    'cut in its last line': lambda text: text[:-2],
    'cut in the middle': lambda text: text[: len(text) // 2],
    'not text': lambda text: b'\xff\xfe' + text,
}


@pytest.mark.parametrize('cut', CUTS)
@pytest.mark.parametrize('name', FILES)
def test_a_file_that_was_cut_is_named(name, cut, finished, capsys):
    path = finished / name
    path.write_bytes(CUTS[cut](path.read_bytes()))
    code, output = report(finished, capsys)
    assert (code, output.out) == (1, '')
    assert output.err.startswith(f"error: '{path}'") and output.err.count('\n') == 1


@pytest.mark.parametrize(
    ('name', 'before', 'after'),
    [
        ('trial.yaml', 'seeds:', 'sodas:'),
        ('trial.yaml', '- 0\n', '- zero\n'),
        ('trial.yaml', 'lrs:\n', 'lrs: 0\nothers:\n'),
        ('trial.yaml', 'tuning_epochs: 4', 'tuning_epochs: four'),
        ('trial.yaml', 'reference: sgd', 'reference: none'),
        ('trial.yaml', '- repopt\n', '- repot\n'),
        ('trial.yaml', 'model: ', '['),
        ('shared.yaml', '\nepochs:', '\nepoch:'),
        ('networks.json', '"step_seconds": 0.1', '"step_seconds": "fast"'),
        ('networks.json', '"parameters"', '"parameter"'),
        (SUMMARY, 'eval_top1', 'top1'),
        (SUMMARY, 'epoch,', ''),
        (SUMMARY, '\n2,', '\n'),
        (SUMMARY, '\n2,', '\n3,'),
        (SUMMARY, ',52.25,', ',,'),
        (SUMMARY, ',52.25,', ',5x,'),
        (SUMMARY, ',52.25,', ',52,25,'),
        (TIMES, 'epoch,', ''),
        (TIMES, '\n2,1.0', '\n2,'),
        (TIMES, '\n2,1.0', '\n2,1.0,3'),
    ],
)
def test_a_file_that_was_edited_is_named(name, before, after, finished, capsys):
    path = finished / name
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    code, output = report(finished, capsys)
    assert (code, output.out) == (1, '')
    assert f"'{path}'" in output.err and output.err.count('\n') == 1


def test_whole_files_are_read(finished, capsys):
    code, output = report(finished, capsys)
    assert code == 0 and '51.75' in output.out


def test_what_is_not_a_trial_is_named(finished, capsys):
    assert main(['trial', '--report', str(finished.parent)]) == 1
    assert f"'{finished}'" in capsys.readouterr().err
