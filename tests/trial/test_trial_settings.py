from dataclasses import replace

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models._registry import _model_pretrained_cfgs

from repopt_timm.datasets import data_config_of
from repopt_timm.train.parsing import parse_arguments
from repopt_timm.trial.trial_command import command_of

from ..helpers import TINY, assert_refused


def arguments_of(trial, run):
    """What the training command makes of a run."""
    words = command_of(run, trial)
    return parse_arguments(words[words.index('train') + 1 :])


def test_arms_are_those_that_the_model_and_the_arguments_allow(trial):
    assert trial().arms == ['branches', 'sgd', 'dirac', 'init', 'repopt', 'identity']
    assert trial('--scales', 'x', '--search', '2').arms[-2:] == ['scales', 'search']


def test_learning_rates_are_those_that_were_given_and_adamw_has_a_hundredth(trial):
    made = trial('--arms', 'sgd', 'adamw', '--lrs', '0.03125', '0.0625')
    assert made.choice('sgd').missing == (0.03125, 0.0625)
    assert made.choice('adamw').missing == (0.000313, 0.000625)
    assert made.arguments_of('adamw')['weight_decay'] == 0.05
    assert trial('--arms', 'adamw', '--lr', '0.1', folder='fixed').choice('adamw').best == pytest.approx(0.001)


@pytest.mark.parametrize(
    ('words', 'named'),
    [
        (f'{TINY} --arms search', '--search N'),
        (f'{TINY} --arms scales', '--scales SOURCE'),
        (f'{TINY} --arms published', 'a name of --scales'),
        (f'{TINY} --arms sgd --reference init', '--reference'),
        (f'{TINY} --scales repopt=a.csv', 'repopt'),
        (f'{TINY} --scales B1=a.csv', 'NAME=SOURCE'),
        (f'{TINY} --opt adamw', '--opt'),
        (f'{TINY} --lrs 0', '--lrs'),
        (f'{TINY} --holdout 1', '--holdout'),
        (f'{TINY} --sched plateau', '--sched plateau'),
        (f'{TINY} --arms sgd --scales mine=a.csv', 'mine'),
        (f'{TINY} --arms sgd --search 3', '--search'),
        (f'{TINY} --cooldown-epochs 2', '--cooldown-epochs'),
        (f'{TINY} --first-seed -1', '--first-seed'),
        (f'{TINY} --epochs x', '--epochs'),
        (f'{TINY} --report x', '--report'),
        ('--report x --seeds 5', 'seeds'),
        (f'{TINY} --first-seed 999', '--first-seed'),
        ('nonesuch', 'nonesuch'),
        ('repopt_vgg_a0_hs', 'repopt_vgg_a0_hs'),
        ('repopt_vgg_a0.cifar10', 'repopt_vgg_a0.cifar10'),
    ],
)
def test_a_bad_argument_of_a_trial_is_named_in_one_line(words, named, tmp_path, capsys):
    where = ['--data', 'images', '--output', str(tmp_path / 'trial')]
    assert_refused(['trial', *words.split(), *where], named, capsys)
    assert not (tmp_path / 'trial').exists()


def test_a_run_gets_the_arguments_that_all_share_and_its_own(trial, tmp_path, caplog):
    config = tmp_path / 'config.yaml'
    config.write_text('model: repopt_vgg_b1\nopt: sgd\nlr: 7\nscales: x\ndata: y\nepochs: 30\ntrain_images: 100\n')
    words = ['--epochs', '20', '--tuning-epochs', '5', '--model-kwargs', 'strides=(1,1,2,2,2)', '--no-aug']
    made = trial('-c', str(config), '--arms', 'repopt', '--lr', '0.1', *words)
    (ignored,) = caplog.messages
    assert 'scales' in ignored and 'epochs' not in ignored
    args = arguments_of(made, made.training('repopt', 1, 0.1))
    assert (args.model, args.opt, args.scales, args.lr, args.seed) == (TINY, 'repopt_sgd', 'initial', 0.1, 1)
    assert (args.epochs, args.train_images, args.no_aug, args.sched_on_updates) == (20, 100, True, True)
    assert list(args.model_kwargs['strides']) == [1, 1, 2, 2, 2] and args.data_dir == 'images'
    assert (args.output, args.experiment) == (str(made.folder / 'runs/repopt'), 'seed-1')
    tuned = arguments_of(made, made.tuning('repopt', 0.1))
    assert (tuned.epochs, tuned.val_interval, tuned.seed, tuned.holdout) == (5, 5, 1000, 0.1)


@pytest.mark.parametrize(
    ('epochs', 'warmup', 'tuning', 'expected'), [(20, 10, 4, 2), (10, 1, 4, 0.4), (10, 0.5, 10, 0.5), (10, 0, 4, 0)]
)
def test_a_shorter_run_warms_up_as_the_others_do(trial, epochs, warmup, tuning, expected):
    counts = ['--epochs', str(epochs), '--warmup-epochs', str(warmup), '--tuning-epochs', str(tuning)]
    assert trial('--arms', 'repopt', *counts).tuning('repopt', 0.1).arguments['warmup_epochs'] == expected


def test_branches_are_trained_from_timms_batchnorms_and_from_neutral_ones(trial):
    words = ['--lr', '0.1', '--model-kwargs', 'depths=(1,1,1,1)', 'widths=(8,8,8,8,8)']
    made = trial('--arms', 'branches', 'unit_branches', *words)
    norms = {}
    for arm in made.arms:
        args = arguments_of(made, made.training(arm, 0, 0.1))
        model = timm.create_model(args.model, **args.model_kwargs)
        assert len(model.stages[0]) == 1
        norms[arm] = torch.cat([each.weight for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d)])
    assert (norms['unit_branches'] == 1).all() and norms['branches'].mean() < 0.2


def test_images_are_prepared_alike_for_all_arms(trial, monkeypatch):
    other = replace(get_pretrained_cfg(f'{TINY}_branches'), crop_pct=0.5, interpolation='nearest', mean=(0, 0, 0))
    monkeypatch.setitem(_model_pretrained_cfgs, f'{TINY}_branches', other)
    made = trial('--arms', 'branches', 'sgd', '--lr', '0.1', '--input-size', '3', '32', '32')
    own, found = [], []
    for arm in made.arms:
        args = arguments_of(made, made.training(arm, 0, 0.1))
        model = timm.create_model(args.model)
        own.append(data_config_of({}, model))
        found.append(data_config_of(vars(args), model))
    assert own[0] != own[1] and found[0] == found[1]


def test_a_trial_of_grey_images_prepares_them_in_one_channel(trial):
    shared = trial('--in-chans', '1', '--arms', 'sgd', '--lr', '0.1').shared
    assert (shared['input_size'][0], len(shared['mean']), len(shared['std'])) == (1, 1, 1)
