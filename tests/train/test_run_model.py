import torch
from torch import nn

from repopt_timm import Scales, load_scales, to_plain
from repopt_timm.checkpoint_model import model_from_checkpoint
from repopt_timm.train.command import main

from ..helpers import TINY, random_scales, tiny_model
from .runs import assert_same_bits, read


def fingerprint(folder):
    """Fingerprint of the scales that a run multiplied with."""
    (found,) = {group['scales_fingerprint'] for group in read(folder)['optimizer']['param_groups']}
    return found


def test_a_target_without_scales_starts_from_the_unsearched_values_and_says_so(train, tmp_path, capsys):
    train('--epochs 1')
    assert read(tmp_path / 'run')['args'].scales == 'initial'
    assert fingerprint(tmp_path / 'run') == Scales.initial(tiny_model()).fingerprint
    assert 'Without --scales this run uses --scales initial' in ''.join(capsys.readouterr())


def test_residual_blocks_are_warned_of_where_a_general_rule_gives_them_scales(train, capsys):
    for model, opt in (('repopt_test_resnet', 'repopt_sgd'), ('repopt_test_resnet', 'sgd'), (TINY, 'repopt_sgd')):
        train(f'--epochs 1 --opt {opt}', model=model, experiment=model + opt)
        assert ('residual blocks' in capsys.readouterr().err) == (model + opt == 'repopt_test_resnetrepopt_sgd')


def test_a_plain_network_gets_no_scales_and_may_start_from_identities(train, tmp_path):
    train('--epochs 1 --opt sgd --init dirac --lr 0 --warmup-lr 0')
    assert read(tmp_path / 'run')['args'].scales is None
    state = read(tmp_path / 'run')['state_dict']
    for name, conv in tiny_model().named_modules():
        if isinstance(conv, nn.Conv2d):
            start = nn.init.dirac_(torch.empty_like(conv.weight))
            alike = conv.in_channels == conv.out_channels and conv.stride == (1, 1)
            assert torch.equal(state[f'{name}.weight'], start) == alike


def test_csla_runs_and_searches_keep_their_scales_and_start_when_they_are_resumed(arguments, tmp_path):
    for kind in ('csla', 'hs'):
        words = arguments('--opt sgd', model=f'{TINY}_{kind}', experiment=kind)
        main([*words, '--epochs', '1', '--scales', 'identity'])
        main([*words, '--epochs', '2', '--resume', *(['--scales', 'identity'] if kind == 'hs' else [])])
        assert len(read(tmp_path / kind)['history']) == 2
    model = model_from_checkpoint(tmp_path / 'csla/last.pth.tar')
    assert Scales.from_model(model).start == Scales.from_model(to_plain(model)).start == 'identity'
    assert load_scales(tmp_path / 'hs/scales.safetensors').start == 'identity'


def test_an_initial_checkpoint_brings_the_scales_that_it_was_trained_with(train, tmp_path, capsys):
    mine = random_scales()
    mine.save(tmp_path / 'mine.safetensors')
    train(f'--epochs 1 --scales {tmp_path / "mine.safetensors"}', experiment='first')
    first = str(tmp_path / 'first/last.pth.tar')
    # A run that is resumed need not repeat what it started from.
    # The folder of a run stands for its checkpoint.
    for extra in (f'--epochs 1 --initial-checkpoint {tmp_path / "first"}', '--epochs 2 --resume'):
        train(extra)
        assert fingerprint(tmp_path / 'run') == fingerprint(tmp_path / 'first') == mine.fingerprint
    train(f'--epochs 1 --initial-checkpoint {first} --scales initial', experiment='other')
    assert 'this run multiplies with' in ''.join(capsys.readouterr())


def test_an_initial_checkpoint_of_other_classes_brings_all_but_the_classifier(train, trained, tmp_path, capsys):
    train(f'--num-classes 5 --initial-checkpoint {trained / "last.pth.tar"} --epochs 1 --lr 0 --warmup-lr 0')
    told = 'other classes than the 5 of this run: all weights are loaded but head.fc.bias, head.fc.weight'
    assert told in capsys.readouterr().err
    before, after = (read(folder)['state_dict'] for folder in (trained, tmp_path / 'run'))
    kept = [name for name in before if not name.startswith('head.fc') and 'running' not in name and 'num_' not in name]
    assert_same_bits({name: before[name] for name in kept}, {name: after[name] for name in kept})
