"""The arguments of a trial, its own and what it hands on to all of its runs."""

import argparse
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from timm.models import resolve_pretrained_cfg

from ..console import CommandParser, number
from ..datasets import data_config_of
from ..train.parsing import make_parser, parse_arguments, read_config, write_config
from .arms import ARMS, EXTRA, arms_of
from .trial_folder import Trial

_logger = logging.getLogger(__name__)

# What each run gets from the trial.
_SET = ('data_dir', 'model', 'opt', 'lr', 'seed', 'output', 'experiment', 'resume', 'override')

# Arguments that would give the arms different starts or different numbers of epochs.
_WITHOUT = (
    *('scales', 'pretrained', 'initial_checkpoint', 'init', 'lr_base', 'lr_base_size', 'lr_base_scale', 'search_first'),
    *('holdout', 'patience', 'warmup_prefix', 'cooldown_epochs', 'log_wandb'),
)

# The defaults of `train` suit 300 epochs; these suit ten.
_DEFAULTS = {'epochs': 10, 'sched_on_updates': True, 'workers': 0, 'checkpoint_hist': 1}

_TUNING_SEED = 1000


def read_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line, and returns the trial's own arguments and the words for the training command."""
    parser = CommandParser(
        prog='repopt-timm trial',
        description='Train a network in several ways, with paired seeds, and report whether they differ.',
        epilog='All other arguments of `repopt-timm train` go to each run, such as --epochs (here 10 by default), '
        '--batch-size or --model-kwargs, but for those that make an arm or a run, such as --opt or --seed.',
        allow_abbrev=False,
    )
    count, rate = number(int, low=1), number(float, above=0)
    add = parser.add_argument
    add('model', nargs='?', help='plain network, such as repopt_vgg_a0, or any timm model')
    add('-c', '--config', metavar='FILE', help='YAML file of training arguments, or the name of a shipped one')
    add('--data', metavar='DIR', help='path to dataset: image folders, or .tar files')
    extra = f'NAMEs of --scales [all possible but {" and ".join(EXTRA)}]'
    add('--arms', nargs='+', help=f'ways to train: {", ".join(ARMS)}, or {extra}')
    add('--seeds', type=count, default=3, help='number of seeds of each arm')
    add('--first-seed', type=number(int, low=0), default=0, help='the first of them')
    lrs = 'learning rates to choose from, for each arm; beyond the lowest and highest if those are the best'
    add('--lrs', nargs='+', type=rate, default=[0.05, 0.1, 0.2], help=lrs)
    add('--lr', type=rate, help='learning rate of all arms, instead of choosing')
    share = number(float, above=0, below=1)
    add('--holdout', type=share, default=0.1, help='share of the training images to choose on')
    add('--tuning-epochs', type=count, help='epochs of these runs [--epochs]')
    scales = "scales for the arm 'scales', or for an arm of that NAME: all that `repopt-timm train --scales` takes"
    add('--scales', nargs='+', default=[], metavar='[NAME=]SOURCE', help=scales)
    add('--search', type=count, help="epochs of the search before each run of the arm 'search'")
    add('--reference', help='arm that the others are compared with [sgd, or the first]')
    add('--jobs', type=count, default=1, help='number of runs side by side')
    add('--threads', type=count, help='threads of each run [OMP_NUM_THREADS, or cores / --jobs]')
    add('--report', nargs='+', metavar='FOLDER', help='only make the report of trials; of several, in --output')
    add('--output', metavar='DIR', help='folder of the trial [output/MODEL-trial]')
    # Its own method is for parsers that know all arguments.
    args, rest = argparse.ArgumentParser.parse_known_args(parser, argv)
    is_named = bool(argv) and argv[0] == args.model
    if bool(args.report) == is_named or (args.report and rest):
        raise ValueError('Name the MODEL of a trial before all flags, or else give --report the folders of trials.')
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.report and (others := sorted(given - {'report', 'output', 'reference'})):
        raise ValueError(f'--report goes with --output and --reference alone, not with {", ".join(others)}.')
    if len(args.report or ()) > 1 and not args.output:
        raise ValueError('--report of several trials needs --output, the folder of their report.')
    return args, rest


def read_trial(args: argparse.Namespace, model: str, shared: dict[str, Any]) -> Trial:
    """Returns the trial of a command line, whose runs share these arguments."""
    scales: dict[str, str] = {}
    for word in args.scales:
        name, _, source = word.partition('=')
        if not source or Path(word).exists() or re.search(r'[/\\.:]', name):
            name, source = 'scales', word
        if not re.fullmatch('[a-z][a-z0-9_]*', name) or name in scales or (name in ARMS and name != 'scales'):
            raise ValueError(
                f"--scales has '{word}', expected NAME=SOURCE. A NAME consists of a-z, 0-9 and _, is "
                f'used once, and is not the name of another arm.'
            )
        scales[name] = source
    arms = arms_of(model, args.arms, scales, args.search)
    reference = args.reference or ('sgd' if 'sgd' in arms else arms[0])
    if reference not in arms:
        raise ValueError(f"--reference is '{reference}', expected one of the arms: {', '.join(arms)}.")
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    if args.lr is None and _TUNING_SEED in seeds:
        raise ValueError(f'--first-seed: learning rates are chosen with the seed {_TUNING_SEED}; take other seeds.')
    return Trial(
        folder=Path(args.output or f'output/{model}-trial'),
        shared=shared,
        model=model,
        arms=arms,
        seeds=seeds,
        lrs=sorted(set(args.lrs)),
        lr=args.lr,
        holdout=args.holdout,
        tuning_epochs=args.tuning_epochs or shared['epochs'],
        tuning_seed=_TUNING_SEED,
        scales=scales,
        search=args.search,
        reference=reference,
    )


def read_shared(model: str, config: str | None, data: str | None, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments that all runs share: a config, in which words of the training command replace values."""
    given, default = vars(parse_arguments(words)), vars(parse_arguments([]))
    if refused := [name for name in (*_SET, *_WITHOUT) if given.get(name) != default.get(name)]:
        flag = '--' + refused[0].replace('_', '-')
        raise ValueError(f'{flag} is not for the runs of a trial. `repopt-timm trial --help` shows its own arguments.')
    values: dict[str, Any] = read_config(config) if config else {}
    ignored = [name for name in _WITHOUT if values.get(name, default[name]) != default[name]]
    if ignored:
        _logger.warning(f'A trial does without these arguments of {config}: {", ".join(ignored)}.')
    shared = {name: value for name, value in values.items() if name not in (*_SET, *_WITHOUT)}
    parser = make_parser()
    parser.set_defaults(**{**_DEFAULTS, **shared, 'model': model, 'data_dir': data or values.get('data_dir')})
    args = parser.parse_args(words)
    # Images are prepared alike for all arms, whose models may state different defaults.
    stated = argparse.Namespace(pretrained_cfg=resolve_pretrained_cfg(model).to_dict())
    found = data_config_of(vars(args), stated)
    for name in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct'):
        setattr(args, name, list(found[name]) if isinstance(found[name], tuple) else found[name])
    return dict(yaml.safe_load(write_config(args)))
