import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from repopt_timm.cli import main
from repopt_timm.train.run_folder import is_busy
from repopt_timm.trial.execution import run_all

from ..helpers import TINY
from ..train.runs import ENVIRONMENT, assert_same_bits, read

# Stands in for a training: does what the folder's name says.
CHILD = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
if folder.name == 'seed-1':
    sys.exit('no memory')
(folder / 'last.pth.tar').write_text('x')
(folder / 'summary.csv').write_text('epoch,train_loss,eval_top1\\n1,2.0,50.0\\n')
"""


def child(code):
    return lambda run, trial: [sys.executable, '-c', code, str(run.folder)]


def test_the_others_go_on_when_a_run_ends_with_an_error(trial):
    made = trial('--arms', 'sgd', '--lr', '0.1', '--seeds', '3', '--epochs', '1')
    failed = run_all(made, 2, 1, child(CHILD))
    assert [run.folder.name for run in failed] == ['seed-1']
    assert [made.training('sgd', seed, 0.1).top1 for seed in range(3)] == [50, None, 50]
    assert 'no memory' in (made.folder / 'runs/sgd/seed-1/train.log').read_text()


def test_checkpoints_of_tuning_runs_are_not_kept(trial):
    made = trial('--arms', 'sgd', '--seeds', '1', '--epochs', '1')
    run_all(made, 2, 1, child(CHILD))
    assert len(list(made.folder.glob('tuning/*/*/summary.csv'))) > 3
    assert [path.parent.name for path in made.folder.rglob('last.pth.tar')] == ['seed-0']


@pytest.mark.parametrize('ending', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_trial_ends_its_runs(trial, ending):
    made = trial('--arms', 'sgd', '--lr', '0.1', '--seeds', '2', '--epochs', '1')
    logs = [made.training('sgd', seed, 0.1).folder / 'train.log' for seed in (0, 1)]

    def interrupt():
        while not all(log.exists() and log.read_text() for log in logs):
            time.sleep(0.02)
        signal.raise_signal(ending)

    # Writes a line when it has begun, and another when it is asked to end.
    code = (
        'import signal, sys, time\n'
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit('asked to end'))\n"
        "print('up', flush=True); time.sleep(60)"
    )
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_all(made, 2, 1, child(code))
    thread.join()
    assert ['asked to end' in log.read_text() for log in logs] == [True, True]


def words_of(data, output, *more):
    small = ['--input-size', '3', '32', '32', '--batch-size', '8', '--log-interval', '1', '--num-classes', '2']
    return ['trial', TINY, '--data', str(data), '--output', str(output), *small, *more]


def test_branches_are_not_trained_in_a_layout_that_corrupts_memory(images, tmp_path, capsys):
    words = ['--device', 'cpu', '--channels-last', '--img-size', '96', '--batch-size', '2']
    assert main(['train', str(images), '--model', 'repvgg_a0', '--output', str(tmp_path), *words]) == 1
    assert "'stem.conv_1x1.conv'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trial_searches_trains_and_reports(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    arms = ['--arms', 'sgd', 'search', '--search', '1', '--seeds', '1', '--lr', '0.02', '--epochs', '2']
    assert main(words_of(images, tmp_path / 'trial', *arms, '--jobs', '2')) == 0
    report = json.loads((tmp_path / 'trial/report.json').read_text())
    for arm in ('sgd', 'search'):
        assert report['arms'][arm]['top1']['0'] > 0 and report['arms'][arm]['activations'] > 0
    assert 'The search left the scales where they started' in capsys.readouterr().out


@pytest.mark.slow
def test_a_trial_goes_on_after_ctrl_c_in_the_middle_of_a_run(images, tmp_path):
    def words(output):
        more = ['--arms', 'repopt', '--seeds', '1', '--lr', '0.02', '--epochs', '8']
        return [sys.executable, '-m', 'repopt_timm.cli', *words_of(images, output, *more)]

    subprocess.run(words(tmp_path / 'whole'), env=ENVIRONMENT, check=True, capture_output=True)
    process = subprocess.Popen(words(tmp_path / 'cut'), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    run = tmp_path / 'cut/runs/repopt/seed-0'
    while not (run / 'summary.csv').exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert 'The same command continues the trial' in process.communicate()[1]
    assert process.returncode == 130 and not is_busy(run)
    subprocess.run(words(tmp_path / 'cut'), env=ENVIRONMENT, check=True, capture_output=True)
    assert_same_bits(read(tmp_path / 'whole/runs/repopt/seed-0')['state_dict'], read(run)['state_dict'])
