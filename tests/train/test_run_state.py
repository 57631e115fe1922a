"""What a run leaves after errors, signals and kills, and what it goes on from."""

import csv
import os
import resource
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

from repopt_timm.train import engine, run
from repopt_timm.train.command import main
from repopt_timm.train.parsing import parse_arguments
from repopt_timm.train.run_checkpoints import find_checkpoint
from repopt_timm.train.run_folder import is_busy

from ..helpers import TINY
from .runs import ENVIRONMENT, TARGET, assert_same_bits, read


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def same_run(first, second):
    assert names_in(first) == names_in(second)
    for name in ('last.pth.tar', 'model_best.pth.tar'):
        assert read(first, name)['epoch'] == read(second, name)['epoch']
        assert_same_bits(read(first, name)['state_dict'], read(second, name)['state_dict'])
    assert (first / 'summary.csv').read_text() == (second / 'summary.csv').read_text()


def damage(path, position=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * position)] ^= 4
    # Not through the link that it shares with a copy.
    path.unlink()
    path.write_bytes(content)


@pytest.fixture
def tops(monkeypatch):
    """The accuracies of the next validations."""
    values = []
    found = torch.zeros(2, 16, dtype=torch.int64)
    measured = lambda *args: ({'loss': 1.0, 'top1': values.pop(0), 'top5': 100.0}, found)  # noqa: E731
    monkeypatch.setattr(engine, 'validate', measured)
    return values


@pytest.fixture
def signalled(monkeypatch):
    """Sends a signal to this process at the start of its n-th epoch from now on, and notes the epochs begun."""
    begun = []
    original = run._start_epoch

    def send(signum, nth):
        def start_epoch(epoch, loaders, args):
            original(epoch, loaders, args)
            begun.append(epoch)
            if len(begun) == nth:
                os.kill(os.getpid(), signum)

        monkeypatch.setattr(run, '_start_epoch', start_epoch)
        return begun

    return send


def told_command(capsys):
    """The command that the last line of a run names."""
    return shlex.split(capsys.readouterr().err.strip().splitlines()[-1].split('repopt-timm train ')[1])


def test_the_folder_holds_arguments_that_repeat_the_run(trained, tmp_path):
    main(['-c', str(trained / 'args.yaml'), '--output', str(tmp_path), '--experiment', 'again'])
    assert_same_bits(read(trained)['state_dict'], read(tmp_path / 'again')['state_dict'])


def test_a_loss_that_is_not_finite_ends_the_run_at_once_and_leaves_its_reason_until_it_goes_on(
    arguments, tmp_path, copied
):
    before = read(copied)
    changed = arguments(*TARGET, '--epochs', '4', '--resume', '--override', '--log-interval', '1')
    with pytest.raises(ValueError, match=r'of epoch 4 of 4 became non-finite at step .* Try a lower --lr'):
        main([*changed, '--lr', '1e20'])
    assert 'non-finite' in (tmp_path / 'run/diverged.txt').read_text()
    assert_same_bits(before['state_dict'], read(tmp_path / 'run')['state_dict'])
    main(changed)
    assert not (tmp_path / 'run/diverged.txt').exists()


def test_weights_that_are_not_finite_are_not_saved(arguments, tmp_path, monkeypatch):
    def train_one_epoch(state, loaders, loss_fn, clip, autocast, epoch, args):
        metrics = original(state, loaders, loss_fn, clip, autocast, epoch, args)
        if epoch == 1:
            with torch.no_grad():
                state.model.head.fc.bias[0] = float('inf')
        return metrics

    original = run.train_one_epoch
    monkeypatch.setattr(run, 'train_one_epoch', train_one_epoch)
    with pytest.raises(ValueError, match=r"'head\.fc\.bias' is not finite after epoch 2"):
        main(arguments(*TARGET))
    assert read(tmp_path / 'run')['epoch'] == 0


def test_a_metric_that_is_nan_is_never_the_best(arguments, tmp_path, tops):
    tops += [50.0, float('nan'), float('nan')]
    main(arguments(*TARGET))
    assert read(tmp_path / 'run', 'model_best.pth.tar')['epoch'] == 0
    assert [name for name in names_in(tmp_path / 'run') if name.startswith('checkpoint')] == ['checkpoint-0.pth.tar']


@pytest.mark.parametrize('place', ['run', 'other'])
def test_the_best_checkpoint_is_one_that_is_there(arguments, tmp_path, tops, place):
    tops += [60.0, 50.0, 90.0, 55.0, 0.0, 55.0]
    extra = [*TARGET, '--checkpoint-hist', '1']
    main(arguments(*extra, '--epochs', '2'))
    copy = tmp_path / place / 'mine.pth.tar'
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes((tmp_path / 'run/last.pth.tar').read_bytes())
    main(arguments(*extra, '--resume'))
    assert read(tmp_path / 'run', 'model_best.pth.tar')['epoch'] == 2
    main(arguments(*extra, '--resume', str(copy), '--override', '--epochs', '2'))
    assert read(copy.parent, 'model_best.pth.tar')['epoch'] == 1
    tops[:] = [55.0]
    main(arguments(*extra, '--resume', str(copy), '--override'))
    assert read(copy.parent, 'model_best.pth.tar')['epoch'] == 2


def test_the_steps_between_which_the_loss_became_nan_are_named(arguments, tmp_path, monkeypatch):
    losses = iter([1.0, 1.0, 1.0, float('nan')])

    class Loss(torch.nn.Module):
        def forward(self, output, target):
            return output.mean() * 0 + next(losses)

    monkeypatch.setattr(run, '_make_loss', lambda *args: Loss())
    with pytest.raises(ValueError, match='steps 3 and 4'):
        main(arguments(*TARGET, '--log-interval', '2'))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('signum', 'workers'), [(signal.SIGINT, '0'), (signal.SIGTERM, '2')])
def test_a_signal_ends_a_run_after_the_batch_and_the_named_command_continues_it(
    arguments, tmp_path, monkeypatch, capsys, signalled, signum, workers
):
    main(arguments(*TARGET, '--workers', workers, experiment='whole'))
    signalled(signum, 2)
    with pytest.raises(SystemExit) as end:
        main(arguments(*TARGET, '--workers', workers))
    assert end.value.code == 128 + signum
    main(told_command(capsys))
    same_run(tmp_path / 'whole', tmp_path / 'run')


@pytest.mark.parametrize(('stopped', 'joint'), [(1, ' '), (2, '=')])
def test_a_run_that_went_back_is_continued_from_where_it_was_stopped(
    arguments, tmp_path, capsys, copied, signalled, stopped, joint
):
    begun = signalled(signal.SIGINT, stopped)
    back = f'--resume{joint}{tmp_path}/run/checkpoint-0.pth.tar --override --momentum 0.5'
    with pytest.raises(SystemExit):
        main(arguments(*TARGET, *back.split()))
    main(told_command(capsys))
    assert begun == [*range(1, stopped + 1), *range(stopped, 3)]
    assert read(tmp_path / 'run')['args'].momentum == 0.5


def test_a_search_that_was_stopped_goes_on_with_its_target(images, tmp_path, capsys, signalled):
    words = f'{images} --model {TINY} --output {tmp_path} --epochs 2 --batch-size 8 --workers 0 --lr 0.02'.split()
    signalled(signal.SIGTERM, 2)
    with pytest.raises(SystemExit) as end:
        main([*words, '--input-size', '3', '32', '32', '--search-first'])
    assert end.value.code == 143
    main(told_command(capsys))
    assert (tmp_path / TINY / 'report.md').exists()


def test_a_run_that_is_stopped_in_its_first_epoch_is_started_again(arguments, tmp_path, monkeypatch, capsys):
    def validate(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    original = engine.validate
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(engine, 'validate', validate)
        main(arguments(*TARGET))
    assert end.value.code == 130
    assert not (tmp_path / 'run').exists()
    command = told_command(capsys)
    assert '--resume' not in command
    main(command)
    assert len(read(tmp_path / 'run')['history']) == 3


@pytest.mark.slow
@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('delay', [0, 2])
def test_a_signal_to_the_whole_group_reaches_a_run_whenever_it_comes(arguments, tmp_path, delay, signum):
    words = arguments(*TARGET, '--epochs', '500', '--workers', '2')
    with subprocess.Popen(
        [sys.executable, '-m', 'repopt_timm.cli', 'train', *words],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        while not (tmp_path / 'run/last.pth.tar').exists():
            time.sleep(0.01)
        time.sleep(0.037 * delay)
        # As a terminal or a batch system does: to the workers too.
        os.killpg(process.pid, signum)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signum, told
    assert 'Traceback' not in told
    assert f'{signal.Signals(signum).name}: continue with  repopt-timm train ' in told.strip().splitlines()[-1]


KILLED = """
import os, pathlib, signal, sys
from repopt_timm.train.command import main
from repopt_timm.train.run_checkpoints import CheckpointSaver

fatal, calls = int(sys.argv[1]), -1

def counting(function):
    def call(*args, **kwargs):
        global calls
        if calls >= 0:
            if calls == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
        return function(*args, **kwargs)
    return call

for name in ('replace', 'link', 'unlink'):
    setattr(os, name, counting(getattr(os, name)))
save = CheckpointSaver.save

def save_counted(self, state):
    global calls
    calls = 0 if state.history[-1]['epoch'] == 1 else -1
    save(self, state)
    calls = -1

CheckpointSaver.save = save_counted
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_write_of_an_epoch_goes_on_as_if_it_was_not(arguments, tmp_path):
    extra = [*TARGET, '--checkpoint-hist', '1']
    main(arguments(*extra, experiment='whole'))
    for fatal in range(100):
        name = f'killed-{fatal}'
        command = [sys.executable, '-c', KILLED, str(fatal), *arguments(*extra, experiment=name)]
        code = subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=False).returncode
        if code == 0:
            break
        assert code == -signal.SIGKILL
        # What others read meanwhile is whole.
        assert read(tmp_path / name, 'model_best.pth.tar')['history']
        main(arguments(*extra, '--resume', experiment=name))
        same_run(tmp_path / 'whole', tmp_path / name)
    assert fatal >= 6


def test_missing_copies_are_made_again_from_the_last_checkpoint_and_rests_of_a_kill_removed(arguments, trained, copied):
    for name in ('model_best.pth.tar', 'summary.csv', 'checkpoint-2.pth.tar'):
        (copied / name).unlink()
    (copied / 'checkpoint-77.pth.tar').write_bytes(b'of another run')
    (copied / '.last.pth-abcd1234.tmp.tar').write_bytes(b'x' * 1000)
    main(arguments(*TARGET, '--resume'))
    same_run(trained, copied)


def test_one_process_trains_in_a_folder_and_a_dead_one_does_not_keep_it(arguments, tmp_path, copied):
    code = f"import fcntl; f = open('{tmp_path}/run/.lock', 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    with subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert is_busy(tmp_path / 'run')
        with pytest.raises(ValueError, match=r"Another process trains in '.*run' already \(process \d+ on "):
            main(arguments(*TARGET, '--resume'))
        other.kill()
    main(arguments(*TARGET, '--resume'))


def test_a_damaged_checkpoint_falls_back_to_the_newest_good_one_and_says_so(arguments, trained, copied, capsys):
    damage(copied / 'last.pth.tar')
    damage(copied / 'checkpoint-2.pth.tar')
    (copied / 'model_best.pth.tar').unlink()
    main(arguments(*TARGET, '--resume'))
    told = capsys.readouterr().err
    assert "last.pth.tar' is not a readable checkpoint" in told
    assert f"Going on from '{copied}/checkpoint-1.pth.tar', which is of epoch 2." in told
    same_run(trained, copied)
    damage(copied / 'last.pth.tar')
    with pytest.raises(ValueError, match=r'last\.pth\.tar'):
        main(arguments(*TARGET, '--resume', str(copied / 'last.pth.tar')))


def test_a_flipped_bit_is_found_wherever_it_matters(trained, tmp_path):
    good, expected = (trained / 'last.pth.tar').read_bytes(), read(trained)['state_dict']
    last = tmp_path / 'last.pth.tar'
    last.write_bytes(good)
    refused = 0
    for index in range(60):
        damage(last, (index + 0.5) / 60)
        try:
            _, checkpoint = find_checkpoint(tmp_path, 'auto', False)
            assert_same_bits(expected, checkpoint['state_dict'])
        except ValueError:
            refused += 1
        last.write_bytes(good)
    assert refused >= 50


def test_a_full_disk_is_named_and_keeps_the_old_checkpoint(arguments, copied):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"run/last\.pth\.tar' cannot be written: File too large"):
            main(arguments(*TARGET, '--epochs', '4', '--resume'))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read(copied)['epoch'] == 2
    assert not list(copied.glob('.*tmp*'))
    main(arguments(*TARGET, '--epochs', '4', '--resume'))
    assert read(copied)['epoch'] == 3


@pytest.mark.parametrize(
    ('extra', 'named'),
    [
        ('--weight-decay 0.1', 'weight_decay 2e-05 -> 0.1'),
        ('--lr 0.5', 'lr 0.02 -> 0.5'),
        ('--mixup 0.2', 'mixup 0.0 -> 0.2'),
        ('--batch-size 4', 'batch_size 8 -> 4'),
        ('--opt-kwargs nesterov=false', "opt_kwargs {} -> {'nesterov': False}"),
        ('--class-weights balanced', "class_weights None -> 'balanced'"),
        ('--opt sgd', '--opt repopt_sgd'),
        ('--override --opt adamw', 'repopt_sgd'),
        ('--override --weight-decay 0', 'resume with the arguments of that run'),
        ('--model-ema', 'model_ema False -> True'),
        ('--amp', 'amp False -> True'),
    ],
)
def test_a_run_is_not_resumed_with_another_training(arguments, copied, extra, named):
    before = (copied / 'last.pth.tar').read_bytes()
    with pytest.raises(ValueError) as error:
        main(arguments(*TARGET, '--epochs', '4', '--resume', *extra.split()))
    assert named in str(error.value)
    assert (copied / 'last.pth.tar').read_bytes() == before


def test_what_does_not_change_the_training_may_differ_and_a_finished_run_is_not_overwritten(arguments, copied):
    main(arguments(*TARGET, '--resume', '--workers', '1', '--log-interval', '7', '--channels-last', '--device', 'cpu'))
    with pytest.raises(ValueError, match='There is a run in'):
        main(arguments(*TARGET))


def test_an_override_is_applied_and_recorded(arguments, tmp_path, copied):
    main(arguments(*TARGET, '--epochs', '4', '--resume', '--override', '--weight-decay', '0.125', '--momentum', '0.5'))
    checkpoint = read(tmp_path / 'run')
    groups = checkpoint['optimizer']['param_groups']
    assert {group['weight_decay'] for group in groups} == {0.0, 0.125}
    assert {group['momentum'] for group in groups} == {0.5}
    assert checkpoint['args'].overridden == ['after epoch 3: momentum 0.9 -> 0.5, weight_decay 2e-05 -> 0.125']
    assert parse_arguments(['-c', str(tmp_path / 'run/args.yaml')]).weight_decay == 0.125
    assert (tmp_path / 'run/args.yaml').read_text().startswith('# after epoch 3: momentum 0.9 -> 0.5')


def test_an_old_checkpoint_does_not_truncate_a_finished_run_unasked(arguments, tmp_path, copied):
    old = str(tmp_path / 'run/checkpoint-0.pth.tar')
    with pytest.raises(ValueError, match=r"is of epoch 1, and the run in '.*' went on to epoch 3"):
        main(arguments(*TARGET, '--resume', old))
    main(arguments(*TARGET, '--resume', old, '--override', '--epochs', '2'))
    assert len(read(tmp_path / 'run')['history']) == 2
    assert 'checkpoint-2.pth.tar' not in names_in(tmp_path / 'run')


def test_the_average_and_the_model_are_both_measured(arguments, tmp_path, capsys):
    main(arguments(*TARGET, '--model-ema', '--epochs', '1'))
    row = read(tmp_path / 'run')['history'][0]
    assert {'eval_top1', 'eval_raw_top1', 'eval_raw_loss'} <= row.keys()
    told = 'The average has not warmed up: after epoch 1 100% of it are the weights that the run started from.'
    assert told in capsys.readouterr().err
    main(arguments(*TARGET, '--model-ema', '--model-ema-decay', '0.3', '--epochs', '1', experiment='warm'))
    assert 'has not warmed up' not in capsys.readouterr().err


def test_what_is_piped_has_a_line_for_each_interval_and_epoch_and_ends_with_the_result(arguments, tmp_path, capsys):
    main(arguments(*TARGET, '--log-interval', '4'))
    out, err = capsys.readouterr()
    assert [line.split(',')[0] for line in out.splitlines()] == [f'epoch {n}/3 train 4/6' for n in (1, 2, 3)]
    assert 'run ETA' in out
    lines = err.strip().splitlines()
    epochs = [line.partition(':')[0] for line in lines if line.startswith('epoch')]
    assert epochs == ['epoch 1/3', 'epoch 2/3', 'epoch 3/3']
    assert 'after 3 epochs, at best' in lines[-1] and 'Next:  repopt-timm evaluate' in lines[-1]
    with open(tmp_path / 'run/summary.csv', newline='') as file:
        assert [row['epoch'] for row in csv.DictReader(file)] == ['1', '2', '3']
