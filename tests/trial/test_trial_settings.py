import math
from dataclasses import replace

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models._registry import _model_pretrained_cfgs

from repopt_timm.datasets import data_config_of
from repopt_timm.train.parsing import parse_arguments
from repopt_timm.trial.execution import prepare
from repopt_timm.trial.trial_settings import read_settings

from .conftest import parse, settings_of


def arguments_of(runs, run):
    """What the training command makes of a run."""
    command = prepare(run, runs.shared)
    return parse_arguments(command[command.index('train') + 1 :])


def test_arms_are_those_that_the_model_and_the_arguments_allow():
    branches = ('branches',) if timm.is_model('test_repopt_vgg_branches') else ()
    assert settings_of()[0].arms == (*branches, 'sgd', 'init', 'repopt')
    assert settings_of('--scales', 'x', '--search', '2')[0].arms[-4:] == ('init', 'repopt', 'scales', 'search')


@pytest.mark.parametrize(
    ('words', 'error'),
    [
        (['--arms', 'search'], r'it needs a search\. Give its epochs with --search N\.'),
        (['--arms', 'scales'], r'it needs scales\. Give them with --scales SOURCE\.'),
        (['--arms', 'sgd', '--reference', 'init'], 'expected one of the arms: sgd'),
        (['--arms', 'published'], 'expected one of .*, repopt, .*, or a name of --scales'),
        (['--scales', 'a.csv', 'b.csv'], "gives 'scales' twice: name each of them"),
        (['--scales', 'repopt=a.csv'], 'that of another arm'),
        (['--scales', 'B1=a.csv'], "has 'B1=a.csv', expected NAME=SOURCE"),
        (['--scales', 'mine='], 'expected NAME=SOURCE'),
        (['--opt', 'adamw'], "unknown argument '--opt'"),
        (['--seed', '3'], "unknown argument '--seed'"),
        (['--lrs', '0'], 'expected finite numbers above 0'),
        (['--search-kwargs', 'resume=auto'], "--search-kwargs has 'resume', which cannot differ in the search"),
        (['--search-kwargs', 'seed=3'], "--search-kwargs has 'seed', which cannot differ"),
        (['--search-kwargs', 'holdout=0.5'], "--search-kwargs has 'holdout', which cannot differ"),
        (['--search-kwargs', 'train_split=validation'], "--search-kwargs has 'train_split', which cannot differ"),
        (['--tuning-seed', '2'], '--tuning-seed is 2, expected a seed other than those of the runs, 0, 1, 2'),
        (['--lrs', '1', '1.001'], r'--lrs has 1\.0 and 1\.001, expected values at least 1 % apart'),
    ],
)
def test_what_cannot_be_is_refused(words, error):
    with pytest.raises(ValueError, match=error):
        settings_of(*words)


@pytest.mark.parametrize('model', ['nonesuch', 'repopt_vgg_a0_hs', 'repopt_vgg_a0.cifar10'])
def test_the_model_is_a_plain_network(model):
    with pytest.raises(ValueError, match=model):
        read_settings(parse([model]))


def test_branches_are_trained_from_timms_batchnorms_and_from_neutral_ones(trial):
    words = ['--lr', '0.1', '--model-kwargs', 'depths=(1,1,1,1)', 'widths=(8,8,8,8,8)']
    runs = trial('--arms', 'branches', 'unit_branches', *words)
    norms = {}
    for arm in runs.settings.arms:
        args = arguments_of(runs, runs.training(arm, 0, 0.1))
        model = timm.create_model(args.model, **args.model_kwargs)
        assert len(model.stages[0]) == 1
        norms[arm] = torch.cat([each.weight for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d)])
    assert (norms['unit_branches'] == 1).all() and norms['branches'].mean() < 0.2


def test_the_plain_network_starts_from_timms_initialization_alone():
    for name, conv in timm.create_model('repopt_vgg_a0', num_classes=10).named_modules():
        if isinstance(conv, torch.nn.Conv2d):
            expected = math.sqrt(2 / (9 * conv.out_channels))
            assert conv.weight.std().item() == pytest.approx(expected, rel=0.1), name


def test_a_run_gets_the_arguments_that_all_share_and_its_own(trial, tmp_path):
    words = [
        '--epochs',
        '20',
        '--tuning-epochs',
        '5',
        '--model-kwargs',
        'strides=(1,1,2,2,2)',
        '--no-aug',
        '--lr',
        '0.1',
    ]
    runs = trial('--arms', 'repopt', *words, '--train-images', '100')
    args = arguments_of(runs, runs.training('repopt', 1, 0.1))
    assert (args.model, args.opt, args.scales, args.lr, args.seed) == (
        'test_repopt_vgg',
        'repopt_sgd',
        'initial',
        0.1,
        1,
    )
    assert (args.epochs, args.warmup_epochs, args.train_images, args.no_aug) == (20, 2, 100, True)
    assert args.model_kwargs == {'strides': [1, 1, 2, 2, 2]}
    assert (args.output, args.experiment, args.resume) == (str(runs.folder / 'runs/repopt'), 'seed-1', 'auto')
    tuned = arguments_of(runs, runs.tuning('repopt', 0.1))
    assert (tuned.epochs, tuned.val_interval, tuned.seed, tuned.train_images) == (5, 5, 1000, 100)


@pytest.mark.parametrize(
    ('epochs', 'warmup', 'tuning', 'expected'),
    [(20, 10, 4, 2), (10, 1, 4, 1), (20, 2, 5, 1), (10, 1, 1, 0), (10, 0, 4, 0)],
)
def test_a_shorter_run_warms_up_as_the_others_do(trial, epochs, warmup, tuning, expected):
    counts = ['--epochs', str(epochs), '--warmup-epochs', str(warmup), '--tuning-epochs', str(tuning)]
    assert trial('--arms', 'repopt', *counts).tuning('repopt', 0.1).arguments['warmup_epochs'] == expected


def test_a_search_differs_from_the_runs_in_all_that_its_arguments_say(trial):
    differ = ['--search-kwargs', 'amp=False', 'clip_grad=None', 'lr=0.3', 'epochs=4', 'cooldown_epochs=2']
    runs = trial('--amp', '--clip-grad', '5', '--lr', '0.1', '--search', '2', *differ)
    search = runs.training('search', 0, 0.1).after
    args = arguments_of(runs, search)
    assert (args.amp, args.clip_grad, args.lr, args.weight_decay) == (False, None, 0.3, 4e-5)
    assert (args.epochs, args.warmup_epochs, search.epochs) == (4, 1, 6)
    args = arguments_of(runs, runs.training('search', 0, 0.1))
    assert (args.amp, args.clip_grad, args.lr) == (True, 5, 0.1)


def test_a_config_gives_what_all_runs_share_and_not_what_the_arms_are(tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text('model: repopt_vgg_b1\nopt: sgd\nlr: 7\nscales: x\nepochs: 30\nbatch_size: 64\n')
    settings, shared, _ = settings_of('-c', str(config), '--batch-size', '32')
    assert (shared.epochs, shared.batch_size, shared.warmup_epochs) == (30, 32, 3)
    assert (settings.model, settings.lr, shared.lr, shared.scales) == ('test_repopt_vgg', None, None, None)


def test_images_are_prepared_alike_for_all_arms(trial, monkeypatch):
    other = replace(
        get_pretrained_cfg('test_repopt_vgg_branches'), crop_pct=0.5, interpolation='nearest', mean=(0, 0, 0)
    )
    monkeypatch.setitem(_model_pretrained_cfgs, 'test_repopt_vgg_branches', other)
    runs = trial('--arms', 'branches', 'sgd', '--lr', '0.1', '--input-size', '3', '32', '32')
    own, found = [], []
    for arm in runs.settings.arms:
        args = arguments_of(runs, runs.training(arm, 0, 0.1))
        model = timm.create_model(args.model)
        own.append(data_config_of({}, model))
        found.append(data_config_of(vars(args), model))
    assert own[0] != own[1] and found[0] == found[1]
