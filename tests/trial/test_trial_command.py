from repopt_timm.cli import main
from repopt_timm.trial.trial_folder import read_saved_settings

from ..helpers import TINY
from .conftest import run_trial


def test_a_finished_trial_learns_from_the_data_what_guessing_is(images, trial, capsys):
    words = ['--data', str(images), '--arms', 'sgd', 'repopt', '--seeds', '1', '--epochs', '2', '--holdout', '0.9']
    words += ['--batch-size', '4', '--input-size', '3', '32', '32', '--device', 'cpu']
    runs = trial(*words)
    run_trial(runs, lambda run: 100 if run.arguments['opt'] == 'sgd' and run.arguments['lr'] == 0.1 else 70)
    assert main(['trial', TINY, *words, '--output', str(runs.folder)]) == 0
    found = read_saved_settings(runs.folder)
    assert (found.classes, found.held_out) == (2, 43)
    text = capsys.readouterr().out
    assert 'No learning rate that was tried is known to train repopt: 70.00 % of 2 classes at 0.00625' in text
    assert 'known to train sgd' not in text


def test_a_held_out_part_that_cannot_be_is_an_error_before_anything_trains(images, tmp_path, capsys):
    words = ['--data', str(images), '--train-images', '48', '--device', 'cpu']
    assert main(['trial', TINY, *words, '--output', str(tmp_path / 'trial')]) == 1
    assert 'there are 43 training images beside the 5 of --holdout: lower it.' in capsys.readouterr().err
