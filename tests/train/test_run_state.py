"""What a run leaves after errors, signals and kills, and what it goes on from."""

import os
import re
import shlex
import shutil
import signal
import time
from functools import partial

import pytest
import torch

from repopt_timm.datasets import core_count
from repopt_timm.train import run, run_checkpoints
from repopt_timm.train.command import main
from repopt_timm.train.interruption import postponed_signals
from repopt_timm.train.parsing import parse_arguments

from ..helpers import TINY
from .runs import assert_same_bits, in_child, read, short_run


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def same_run(first, second):
    assert names_in(first) == names_in(second)
    for name in ('last.pth.tar', 'model_best.pth.tar'):
        assert read(first, name)['epoch'] == read(second, name)['epoch']
        assert_same_bits(read(first, name)['state_dict'], read(second, name)['state_dict'])
    assert (first / 'summary.csv').read_text() == (second / 'summary.csv').read_text()


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    # Not through the link that it shares with a copy.
    path.unlink()
    path.write_bytes(content)


def told_command(capsys):
    """The command that the last line of a run names."""
    return shlex.split(capsys.readouterr().err.strip().splitlines()[-1].split('repopt-timm train ')[1])


def test_the_folder_holds_arguments_that_repeat_the_run(trained, tmp_path):
    main(['-c', str(trained / 'args.yaml'), '--output', str(tmp_path), '--experiment', 'again'])
    assert_same_bits(read(trained)['state_dict'], read(tmp_path / 'again')['state_dict'])


def test_a_loss_that_is_not_finite_ends_the_run_at_once_and_leaves_its_reason_until_it_goes_on(arguments, copied):
    before = read(copied)
    changed = arguments('--epochs 4 --resume --override --log-interval 1')
    with pytest.raises(ValueError, match=r'of epoch 4 of 4 became non-finite by step .* Try a lower --lr'):
        main([*changed, '--lr', '1e20'])
    assert 'non-finite' in (copied / 'diverged.txt').read_text()
    assert_same_bits(before['state_dict'], read(copied)['state_dict'])
    main(changed)
    assert not (copied / 'diverged.txt').exists()


def test_weights_that_are_not_finite_are_not_saved(train, tmp_path, monkeypatch):
    def train_one_epoch(state, *args):
        with torch.no_grad():
            state.model.head.fc.bias[0] = float('inf')
        return {'loss': 1.0, 'lr': 0.1}

    monkeypatch.setattr(run, 'train_one_epoch', train_one_epoch)
    with pytest.raises(ValueError, match=r"'head\.fc\.bias' is not finite after epoch 1"):
        train()
    assert not (tmp_path / 'run').exists()


def test_the_best_checkpoints_are_kept_of_those_that_are_there(train, tmp_path, tops):
    tops += [60.0, 50.0, 90.0, 70.0, float('nan')]
    train('--checkpoint-hist 2 --epochs 5')
    best = ['checkpoint-2.pth.tar', 'checkpoint-3.pth.tar', 'last.pth.tar', 'model_best.pth.tar']
    assert [name for name in names_in(tmp_path / 'run') if name.endswith('.tar')] == best
    assert read(tmp_path / 'run', 'model_best.pth.tar')['epoch'] == 2
    # In another folder only this checkpoint exists.
    copy = tmp_path / 'other/mine.pth.tar'
    copy.parent.mkdir()
    shutil.copy(tmp_path / 'run/last.pth.tar', copy)
    tops += [55.0, 55.0]
    train(f'--resume {copy} --epochs 6')
    assert read(copy.parent, 'model_best.pth.tar')['epoch'] == 5


def test_a_run_goes_back_with_other_arguments_on_request_alone_and_is_continued_from_there(
    train, capsys, copied, signalled
):
    old = f'--resume={copied}/checkpoint-0.pth.tar --momentum 0.5 --weight-decay 0.125'
    with pytest.raises(ValueError, match='is of epoch 1, and the run went on to epoch 3'):
        train(old)
    begun = signalled(signal.SIGINT, 2)
    with pytest.raises(SystemExit):
        train(f'{old} --override')
    assert 'checkpoint-2.pth.tar' not in names_in(copied)
    main(told_command(capsys))
    assert begun == [1, 2, 2]
    checkpoint, told = read(copied), 'after epoch 1: momentum 0.9 -> 0.5, weight_decay 2e-05 -> 0.125'
    groups = checkpoint['optimizer']['param_groups']
    assert {(group['momentum'], group['weight_decay']) for group in groups} == {(0.5, 0.0), (0.5, 0.125)}
    assert checkpoint['args'].overridden == [told]
    assert (copied / 'args.yaml').read_text().startswith(f'# {told}')
    assert parse_arguments(['-c', str(copied / 'args.yaml')]).weight_decay == 0.125


def test_search_first_is_continued_after_a_signal(train, tmp_path, capsys, signalled):
    signalled(signal.SIGTERM, 2)
    with pytest.raises(SystemExit, match='143'):
        train('--search-first --weight-decay 5e-4 --epochs 2 --opt-kwargs grad_mults=None')
    main(told_command(capsys))
    assert f'are in {tmp_path / "run"}' in capsys.readouterr().out
    search, target = (read(tmp_path / 'run' / name)['args'] for name in ('search', 'target'))
    assert (search.model, search.opt, search.weight_decay) == (f'{TINY}_hs', 'sgd', 4e-5)
    assert (target.model, target.opt, target.weight_decay) == (TINY, 'repopt_sgd', 5e-4)
    assert target.scales == str(tmp_path / 'run/search/scales.safetensors')


def test_a_run_that_is_stopped_in_its_first_epoch_is_started_again(train, tmp_path, capsys, signalled):
    signalled(signal.SIGINT, 1)
    with pytest.raises(SystemExit, match='130'):
        train()
    assert not (tmp_path / 'run').exists()
    command = told_command(capsys)
    assert '--resume' not in command
    main(command)
    assert len(read(tmp_path / 'run')['history']) == 3


def test_a_second_ctrl_c_does_not_wait_for_the_batch():
    sent = []
    with pytest.raises(KeyboardInterrupt), postponed_signals():
        for nth in (1, 2):
            sent.append(nth)
            signal.raise_signal(signal.SIGINT)
    assert sent == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(('signum', 'delay'), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGTERM, 0.074)])
def test_a_signal_to_the_whole_group_reaches_a_run_whenever_it_comes(arguments, tmp_path, delay, signum):
    process = in_child(arguments('--epochs 500 --workers 2'), tmp_path / 'log')
    while not (tmp_path / 'run/last.pth.tar').exists():
        time.sleep(0.01)
    time.sleep(delay)
    # As a terminal or a batch system does: to the workers too.
    os.killpg(process.pid, signum)
    process.join(60)
    told = (tmp_path / 'log').read_text()
    assert process.exitcode == 128 + signum, told
    assert 'Traceback' not in told
    assert f'{signal.Signals(signum).name}: continue with  repopt-timm train ' in told.strip().splitlines()[-1]


def kill_at(fatal):
    """Kills this process at a call of the system's while the checkpoint of an epoch is written."""
    calls = []

    def counted(function, *args, **kwargs):
        if len(calls) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(function)
        return function(*args, **kwargs)

    def save(*args):
        with pytest.MonkeyPatch.context() as patch:
            for name in ('replace', 'link', 'unlink'):
                patch.setattr(os, name, partial(counted, getattr(os, name)))
            saved(*args)

    saved, run.save = run_checkpoints.save, save


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_write_of_an_epoch_goes_on_as_if_it_was_not(train, arguments, tmp_path):
    extra = '--checkpoint-hist 1 --epochs 2'
    train(extra, experiment='whole')
    train(f'{extra} --checkpoint-hist 2', experiment='begun')
    begun = (tmp_path / 'begun/checkpoint-0.pth.tar').read_bytes()
    for fatal in range(100):
        folder = tmp_path / f'killed-{fatal}'
        folder.mkdir()
        (folder / 'last.pth.tar').write_bytes(begun)
        words = arguments(f'{extra} --resume', experiment=folder.name)
        process = in_child(words, prepare=partial(kill_at, fatal))
        process.join()
        # Other processes never read a half-written file.
        assert read(folder, 'model_best.pth.tar')['history']
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        main(words)
        same_run(tmp_path / 'whole', folder)
    assert fatal >= 6


def test_missing_copies_are_made_again_from_the_last_checkpoint_and_temporary_files_removed(train, trained, copied):
    for name in ('model_best.pth.tar', 'summary.csv', 'checkpoint-2.pth.tar'):
        (copied / name).unlink()
    (copied / 'checkpoint-77.pth.tar').write_bytes(b'of another run')
    (copied / '.last.pth-abcd1234.tmp.tar').write_bytes(b'x' * 1000)
    train('--resume')
    same_run(trained, copied)


def test_one_process_trains_in_a_folder_and_a_dead_one_does_not_keep_it(train, arguments, tmp_path, copied):
    process = in_child(arguments('--epochs 500 --resume --workers 1'))
    while not (copied / 'checkpoint-3.pth.tar').exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match=r"training in '.*run'"):
        train('--resume')
    process.kill()
    process.join()
    train('--resume')


def test_a_damaged_checkpoint_falls_back_to_the_newest_good_one_and_says_so(train, trained, copied, capsys):
    damage(copied / 'last.pth.tar')
    damage(copied / 'checkpoint-2.pth.tar')
    (copied / 'model_best.pth.tar').unlink()
    train('--resume')
    told = capsys.readouterr().err
    assert "last.pth.tar' is not a readable checkpoint" in told
    assert f'Resuming {copied}/checkpoint-1.pth.tar after epoch 2.' in told
    same_run(trained, copied)
    damage(copied / 'last.pth.tar')
    with pytest.raises(ValueError, match=r'last\.pth\.tar'):
        train(f'--resume {copied / "last.pth.tar"}')


@pytest.mark.parametrize(
    ('extra', 'named'),
    [
        ('--weight-decay 0.1', 'weight_decay 2e-05 -> 0.1'),
        ('--mixup 0.2', 'mixup 0.0 -> 0.2'),
        ('--opt-kwargs nesterov=false', "opt_kwargs {} -> {'nesterov': False}"),
        ('--class-weights balanced', "class_weights None -> 'balanced'"),
        ('--override --opt adamw', "opt 'repopt_sgd' -> 'adamw'"),
        ('--override --weight-decay 0', 'resume with the arguments of that run'),
        ('--model-ema', 'model_ema False -> True'),
        ('--model-kwargs strides=(2,2,2,2,1)', 'saved with the scales'),
    ],
)
def test_a_run_is_not_resumed_with_another_training(train, trained, extra, named):
    before = (trained / 'last.pth.tar').read_bytes()
    with pytest.raises(ValueError, match=re.escape(named)):
        train(f'--epochs 4 --resume={trained}/last.pth.tar {extra}')
    assert (trained / 'last.pth.tar').read_bytes() == before


def test_a_resumed_run_says_that_its_schedule_is_longer(arguments, copied, capsys):
    main(arguments('--cooldown-epochs 1 --resume'))
    assert '4 epochs, not of 3' in capsys.readouterr().err and len(read(copied)['history']) == 4


def test_a_run_is_not_resumed_on_other_classes(images, tmp_path):
    own = shutil.copytree(images, tmp_path / 'own')
    main(short_run(own, tmp_path))
    for split in ('train', 'validation'):
        (own / split / 'dark').rename(own / split / 'pale')
    with pytest.raises(ValueError, match='other classes'):
        main(short_run(own, tmp_path, '--epochs 4 --resume'))


def test_a_run_goes_on_in_lower_precision_and_begins_an_average_on_request(train, copied):
    train('--epochs 4 --resume --override --amp --model-ema')
    assert {'amp_scaler', 'state_dict_ema'} <= read(copied).keys()


def test_a_run_without_a_checkpoint_to_resume_from_says_so(train, capsys):
    train('--resume --epochs 1', experiment='mistyped')
    assert "mistyped'" in capsys.readouterr().err


def test_what_does_not_change_the_training_may_differ_and_a_finished_run_is_not_overwritten(
    train, arguments, copied, recwarn
):
    train('--resume --workers 64 --log-interval 7 --channels-last --device cpu')
    assert not any('worker' in str(warning.message) for warning in recwarn)
    assert parse_arguments(['-c', str(copied / 'args.yaml')]).workers == core_count()
    with pytest.raises(ValueError, match='There is a run in'):
        train()


def test_the_average_and_the_model_are_both_measured(train, searched, capsys):
    row = read(searched)['history'][-1]
    assert row['eval_loss'] != row['eval_raw_loss'] and 'eval_raw_top1' in row
    for extra, told in (('', True), ('--model-ema-decay 0.3', False)):
        train(f'--model-ema --epochs 1 {extra}', experiment=f'told-{told}')
        assert ('after epoch 1 100% of it are the weights that' in capsys.readouterr().err) == told


def test_what_is_piped_has_a_line_for_each_interval_and_epoch_and_ends_with_the_result(train, capsys):
    train('--log-interval 4')
    out, err = capsys.readouterr()
    assert [line.split(',')[0] for line in out.splitlines()] == [f'epoch {n}/3 train 4/6' for n in (1, 2, 3)]
    assert 'run ETA' in out
    lines = err.strip().splitlines()
    epochs = [line.partition(':')[0] for line in lines if line.startswith('epoch')]
    assert epochs == ['epoch 1/3', 'epoch 2/3', 'epoch 3/3']
    assert 'after 3 epochs, at best' in lines[-1] and 'Next:  repopt-timm evaluate' in lines[-1]
