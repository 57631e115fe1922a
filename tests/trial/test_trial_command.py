import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from repopt_timm.cli import main
from repopt_timm.train.interruption import InterruptedRunError
from repopt_timm.trial.trial_command import run_all
from repopt_timm.trial.trial_folder import open_trial

from ..helpers import TINY, python_path
from .conftest import run_trial

# Stands in for a training: does what the folder's name says.
CHILD = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
if folder.name == 'seed-1':
    sys.exit('no memory')
(folder / 'last.pth.tar').write_text('x')
(folder / 'summary.csv').write_text('epoch,train_loss,eval_top1\\n1,2.0,50.0\\n')
"""

# Writes a line when it has begun, and another when it is asked to end.
SLEEPER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit('asked to end'))
print('up', flush=True); time.sleep(60)
"""


def child(code):
    return lambda run, trial: [sys.executable, '-c', code, str(run.folder)]


def test_the_others_go_on_when_a_run_ends_with_an_error(trial):
    made = trial('--arms', 'sgd', '--seeds', '3', '--epochs', '1')
    failed = run_all(made, 2, 1, child(CHILD))
    assert [run.folder.name for run in failed] == ['seed-1']
    assert [made.training('sgd', seed, 0.1).is_open for seed in range(3)] == [False, True, False]
    assert 'no memory' in (made.folder / 'runs/sgd/seed-1/train.log').read_text()
    # Checkpoints of tuning runs are not kept.
    assert len(list(made.folder.glob('tuning/*/*/summary.csv'))) > 3
    assert sorted(path.parent.name for path in made.folder.rglob('last.pth.tar')) == ['seed-0', 'seed-2']


def test_an_interrupted_trial_ends_its_runs(trial):
    made = trial('--arms', 'sgd', '--lr', '0.1', '--seeds', '2', '--epochs', '1')
    logs = [made.training('sgd', seed, 0.1).folder / 'train.log' for seed in (0, 1)]

    def interrupt():
        while not all(log.exists() and log.read_text() for log in logs):
            time.sleep(0.02)
        signal.raise_signal(signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(InterruptedRunError):
        run_all(made, 2, 1, child(SLEEPER))
    thread.join()
    assert ['asked to end' in log.read_text() for log in logs] == [True, True]


def test_a_finished_trial_learns_from_the_data_what_guessing_is(images, trial, capsys):
    words = ['--data', str(images), '--arms', 'sgd', 'repopt', '--seeds', '1', '--epochs', '2', '--holdout', '0.9']
    words += ['--batch-size', '4', '--input-size', '3', '32', '32', '--device', 'cpu']
    made = trial(*words)
    run_trial(made, lambda run: 100 if run.arguments['opt'] == 'sgd' and run.arguments['lr'] == 0.1 else 70)
    assert main(['trial', TINY, *words, '--output', str(made.folder)]) == 0
    found = open_trial(made.folder)
    assert (found.classes, found.held_out) == (2, 43)
    text = capsys.readouterr().out
    assert 'repopt may not have learned' in text and '0.00625, it reached 70.00 %' in text
    assert 'sgd may not have learned' not in text


def test_a_held_out_part_that_cannot_be_is_an_error_before_anything_trains(images, tmp_path, capsys):
    words = ['--data', str(images), '--train-images', '48', '--device', 'cpu']
    assert main(['trial', TINY, *words, '--output', str(tmp_path / 'trial')]) == 1
    assert '--holdout' in capsys.readouterr().err


def test_without_pandas_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'pandas', None)
    monkeypatch.delitem(sys.modules, 'repopt_timm.trial.trial_command')
    assert main(['trial', TINY]) == 1
    assert "pip install 'repopt-timm[trial]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trial_searches_trains_goes_on_after_ctrl_c_and_reports(images, tmp_path, capsys, monkeypatch):
    # The order of sums, and so the last bit, depends on the number of threads.
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setenv('PYTHONPATH', python_path())
    folder = tmp_path / 'trial'
    words = ['trial', TINY, '--data', str(images), '--output', str(folder), '--input-size', '3', '32', '32']
    words += ['--batch-size', '8', '--num-classes', '2', '--arms', 'search', '--search', '1', '--seeds', '1']
    words += ['--lr', '0.02', '--epochs', '8']
    command = [sys.executable, '-m', 'repopt_timm.cli', *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    run = folder / 'runs/search/seed-0'
    while not (run / 'summary.csv').exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert 'The same command continues the trial' in process.communicate()[1]
    assert process.returncode == 130
    trained = (run / 'summary.csv').read_text().splitlines()
    assert 1 < len(trained) < 9 and (run / 'last.pth.tar').exists()
    assert main(words) == 0
    assert (run / 'summary.csv').read_text().splitlines()[: len(trained)] == trained
    # Only the epoch that the signal cut off was trained twice.
    assert len((run / 'times.csv').read_text().splitlines()) in (9, 10)
    arm = json.loads((folder / 'report.json').read_text())['arms']['search']
    assert arm['top1']['0'] > 0 and arm['activations'] > 0
    assert 'The search left the scales where they started' in capsys.readouterr().out
