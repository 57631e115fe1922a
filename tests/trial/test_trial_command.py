import subprocess
import sys

from repopt_timm.cli import main
from repopt_timm.trial.trial_folder import open_trial

from ..helpers import TINY
from .conftest import run_trial


def test_a_finished_trial_learns_from_the_data_what_guessing_is(images, trial, capsys):
    words = ['--data', str(images), '--arms', 'sgd', 'repopt', '--seeds', '1', '--epochs', '2', '--holdout', '0.9']
    words += ['--batch-size', '4', '--input-size', '3', '32', '32', '--device', 'cpu']
    made = trial(*words)
    run_trial(made, lambda run: 100 if run.arguments['opt'] == 'sgd' and run.arguments['lr'] == 0.1 else 70)
    assert main(['trial', TINY, *words, '--output', str(made.folder)]) == 0
    found = open_trial(made.folder).settings
    assert (found.classes, found.held_out) == (2, 43)
    text = capsys.readouterr().out
    assert 'No learning rate that was tried is known to train repopt: 70.00 % of 2 classes at 0.00625' in text
    assert 'known to train sgd' not in text


def test_a_held_out_part_that_cannot_be_is_an_error_before_anything_trains(images, tmp_path, capsys):
    words = ['--data', str(images), '--train-images', '48', '--device', 'cpu']
    assert main(['trial', TINY, *words, '--output', str(tmp_path / 'trial')]) == 1
    assert '--holdout' in capsys.readouterr().err


def test_without_pandas_the_command_says_what_to_install():
    code = "import sys; sys.modules['pandas'] = None; from repopt_timm.cli import main; sys.exit(main(['trial', 'x']))"
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert found.returncode == 1 and "pip install 'repopt-timm[trial]'" in found.stderr
