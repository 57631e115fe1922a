"""The arguments of a trial, its own and what it hands on to all of its runs."""

import argparse
import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from timm.data import resolve_data_config
from timm.models import resolve_pretrained_cfg

from ..train.argument import ANY_COUNT, Argument
from ..train.parsing import add_argument, configured_arguments, given_arguments, search_arguments
from ..train.schema import ARGUMENTS, SEARCH_DEFAULTS, SECTIONS
from .arms import ARMS, GIVEN, arm_of, arms_of, target_name

__all__ = ['TrialSettings', 'add_trial_arguments', 'read_report_settings', 'read_settings']

_OWN: tuple[Argument, ...] = (
    Argument('data', str, None, 'path to dataset: image folders, or .tar files', metavar='DIR'),
    Argument(
        'arms',
        str,
        None,
        f'ways to train: {", ".join(ARMS)}, or names that --scales gives [all that the model and the other arguments '
        'allow]',
        count=ANY_COUNT,
        metavar='ARM',
    ),
    Argument('seeds', int, 3, 'number of seeds; each arm is trained with each of them', low=1),
    Argument('first_seed', int, 0, 'the first of them', low=0, high=10**8),
    Argument(
        'lrs',
        float,
        [0.05, 0.1, 0.2],
        'learning rates to choose from, for each arm, in a run on a part of the training images. If the best is the '
        'lowest or highest, another one beyond it is tried, up to three times',
        above=0,
        count=ANY_COUNT,
        metavar='LR',
    ),
    Argument('lr', float, None, 'learning rate of all arms, instead of choosing', above=0),
    Argument(
        'holdout', float, 0.1, 'share of the training images on which learning rates are compared', above=0, below=1
    ),
    Argument('tuning_epochs', int, None, 'epochs of these runs [--epochs]', low=1),
    Argument('tuning_seed', int, 1000, 'seed of these runs', low=0, high=10**9),
    Argument(
        'scales',
        str,
        None,
        "scales for the arm 'scales', or for an arm of that NAME: a file, a folder with a model card, "
        "'hf-hub:user/repo[@revision]', or the name of scales that ship",
        count=ANY_COUNT,
        metavar='[NAME=]SOURCE',
    ),
    Argument('search', int, None, "epochs of a hyper-search for the arm 'search', one search for each seed", low=1),
    Argument(
        'search_kwargs',
        dict,
        SEARCH_DEFAULTS,
        'arguments of the search that differ, such as lr=...',
        metavar='K=V',
    ),
    Argument(
        'reference',
        str,
        None,
        'arm that the others are compared with [sgd, or the first arm]',
        metavar='ARM',
        free=True,
    ),
    Argument('jobs', int, 1, 'number of runs side by side, each a process of its own', low=1, free=True),
    Argument(
        'threads',
        int,
        None,
        'threads of each run [OMP_NUM_THREADS, or the cores of this machine divided by --jobs]',
        low=1,
        free=True,
    ),
    Argument(
        'report',
        str,
        None,
        'make the report of trials in these folders anew, and train nothing; of several, one report in --output',
        count=ANY_COUNT,
        metavar='FOLDER',
        free=True,
    ),
    Argument('output', str, None, 'folder of the trial [output/MODEL-trial]', metavar='DIR', free=True),
)
_OWN_BY_NAME = {argument.name: argument for argument in _OWN}

# What the trial sets itself, or what would not be the same start for each arm.
_NOT_SHARED = {
    *('data_dir', 'model', 'scales', 'pretrained', 'initial_checkpoint', 'resume', 'override', 'opt', 'lr', 'lr_base'),
    *('lr_base_size', 'lr_base_scale', 'seed', 'output', 'experiment', 'search_first', 'search_kwargs', 'holdout'),
    *('log_wandb', 'debug'),
}

# What the trial sets itself, so that seeds are paired and held-out images stay unseen, or what is not part of a search.
_NOT_OF_SEARCHES = {
    *('model', 'scales', 'resume', 'override', 'output', 'experiment', 'search_first', 'search_kwargs', 'debug'),
    *('seed', 'holdout', 'train_split'),
}

# A rate beyond the grid is rounded to three digits, which still have to set it apart.
_CLOSEST_RATES = 1.01

# A training of 300 epochs has other needs than a trial of ten.
_DEFAULTS: dict[str, Any] = {'epochs': 10, 'sched_on_updates': True, 'workers': 0, 'checkpoint_hist': 1}
_HELP = {
    'sched': 'schedule, stepped on updates unless a config sets sched_on_updates: false',
    'warmup_epochs': 'epochs of warm-up [a tenth of --epochs, 5 at most]',
}
# A flag cannot turn it off.
_NOT_FLAGS = {*_NOT_SHARED, 'sched_on_updates'}


@dataclass(frozen=True)
class TrialSettings:
    """What a trial is of.

    Attributes:
        model: Name of the plain network.
        arms: Names of the arms.
        seeds: Seeds.
        lrs: Learning rates to choose from.
        lr: Learning rate of all arms, if it is not chosen.
        holdout: Share of the training images to choose on.
        tuning_epochs: Epochs of the runs that a choice is made by.
        tuning_seed: Their seed.
        scales: Name of an arm to its given scales.
        search: Epochs of a search.
        search_kwargs: Arguments of a search that differ.
        reference: Arm that the others are compared with.
        fingerprints: Name of an arm to the fingerprint of its given scales, as far as they have been read.
        classes: Number of classes; None if unknown.
        held_out: Number of images that learning rates are compared on; None if unknown.
    """

    model: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    lr: float | None
    holdout: float
    tuning_epochs: int
    tuning_seed: int
    scales: dict[str, str]
    search: int | None
    search_kwargs: dict[str, Any]
    reference: str
    fingerprints: dict[str, str] = field(default_factory=dict)
    classes: int | None = None
    held_out: int | None = None


def add_trial_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `repopt-timm trial` to a parser, which gives texts."""
    parser.add_argument(
        'model', nargs='?', metavar='MODEL', help='plain network, such as repopt_vgg_a0; any timm model'
    )
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of training arguments, or a shipped name')
    group = parser.add_argument_group('Trial')
    for argument in _OWN:
        add_argument(group, argument)
    for title, section in SECTIONS.items():
        group = parser.add_argument_group(f'{title}, of each run')
        for argument in section:
            name = argument.name
            if name not in _NOT_FLAGS:
                default, text = _DEFAULTS.get(name, argument.default), _HELP.get(name, argument.help)
                add_argument(group, replace(argument, default=default, help=text))


def read_settings(namespace: argparse.Namespace) -> tuple[TrialSettings, argparse.Namespace, argparse.Namespace]:
    """Checks the arguments of a trial.

    Args:
        namespace: What the parser gave.

    Returns:
        What the trial is of; what its runs share, as arguments of a run; and `jobs`, `threads`,
        `output`, and `reference` if it is given.

    Raises:
        FileNotFoundError: If the config does not exist.
        ValueError: If a value is not one that the argument can have, or an arm cannot be.
    """
    texts = vars(namespace)
    if 'model' not in texts:
        raise ValueError(
            'Name the MODEL of a trial before all flags, such as repopt_vgg_a0, or give --report the folders of trials.'
        )
    model = target_name(texts.pop('model'))
    config = texts.pop('config', None)
    own = {name: copy.deepcopy(argument.default) for name, argument in _OWN_BY_NAME.items()}
    own |= _own(texts)
    own['scales'] = _given_scales(own['scales'] or ())
    own['search_kwargs'] = search_arguments(SEARCH_DEFAULTS | own['search_kwargs'])
    for name in _NOT_OF_SEARCHES & set(own['search_kwargs']):
        raise ValueError(f"--search-kwargs has '{name}', which cannot differ in the search. Remove it.")
    lrs = tuple(sorted(set(own['lrs'])))
    for lower, higher in pairwise(lrs):
        if higher / lower < _CLOSEST_RATES - 1e-9:
            raise ValueError(f'--lrs has {lower} and {higher}, expected values at least 1 % apart. Remove one of them.')
    shared = _shared(model, config, texts, own['data'])
    arms = arms_of(model, own['arms'], own['scales'], own['search'])
    reference = own['reference'] or ('sgd' if 'sgd' in arms else arms[0])
    if reference not in arms:
        raise ValueError(f"--reference is '{reference}', expected one of the arms: {', '.join(arms)}.")
    settings = TrialSettings(
        model=model,
        arms=tuple(arms),
        seeds=tuple(range(own['first_seed'], own['first_seed'] + own['seeds'])),
        lrs=lrs,
        tuning_epochs=own['tuning_epochs'] or shared.epochs,
        reference=reference,
        **{name: own[name] for name in ('lr', 'holdout', 'tuning_seed', 'scales', 'search', 'search_kwargs')},
    )
    if settings.lr is None and settings.tuning_seed in settings.seeds:
        raise ValueError(
            f'--tuning-seed is {settings.tuning_seed}, expected a seed other than those of the runs, '
            f'{", ".join(map(str, settings.seeds))}. Choose one of its own.'
        )
    local = {name: own[name] for name in ('jobs', 'threads', 'reference')}
    return settings, shared, argparse.Namespace(**local, output=own['output'] or f'output/{model}-trial')


def _given_scales(words: Sequence[str]) -> dict[str, str]:
    """Returns the name of an arm to its scales."""
    scales: dict[str, str] = {}
    for word in words:
        name, separator, source = word.partition('=')
        if not separator or Path(word).exists() or re.search(r'[/\\.:]', name):
            name, source = 'scales', word
        elif not re.fullmatch('[a-z][a-z0-9_]*', name) or not source:
            raise ValueError(f"--scales has '{word}', expected NAME=SOURCE, where a NAME is of a to z, 0 to 9 and _.")
        if name in scales:
            raise ValueError(f"--scales gives '{name}' twice: name each of them, such as published=FILE.")
        if arm_of(name).scales != GIVEN:
            raise ValueError(f"--scales gives the name '{name}', which is that of another arm. Choose another name.")
        scales[name] = source
    return scales


def read_report_settings(namespace: argparse.Namespace) -> tuple[list[str], str | None, str | None] | None:
    """Checks the arguments of `--report`.

    Args:
        namespace: What the parser gave.

    Returns:
        Folders, `--output` and `--reference`; None without `--report`.

    Raises:
        ValueError: If there are arguments beside these.
    """
    texts = vars(namespace)
    if 'report' not in texts:
        return None
    own = _own(texts)
    others = [*texts, *(set(own) - {'report', 'output', 'reference'})]
    if others:
        raise ValueError(f'--report goes with --output and --reference alone, not with {", ".join(sorted(others))}.')
    if len(own['report']) > 1 and not own.get('output'):
        raise ValueError('--report of several trials needs --output, the folder of their report.')
    return own['report'], own.get('output'), own.get('reference')


def _own(texts: dict[str, Any]) -> dict[str, Any]:
    """Takes the trial's own arguments out of what the parser gave, and checks them."""
    names = [name for name in texts if name in _OWN_BY_NAME]
    return {name: _OWN_BY_NAME[name].parse(texts.pop(name), _OWN_BY_NAME[name].flag) for name in names}


def _shared(model: str, config: str | None, texts: dict[str, Any], data: str | None) -> argparse.Namespace:
    configured = {} if config is None else configured_arguments(config)
    given = {name: value for name, value in configured.items() if name not in _NOT_SHARED or name == 'data_dir'}
    given |= given_arguments(argparse.Namespace(**texts))
    if data is not None:
        given['data_dir'] = data
    values = {name: copy.deepcopy(argument.default) for name, argument in ARGUMENTS.items()}
    values |= {**_DEFAULTS, **given, 'model': model}
    if values['warmup_epochs'] is None:
        values['warmup_epochs'] = min(5, math.ceil(values['epochs'] / 10))
    shared = argparse.Namespace(**values)
    # Images are prepared alike for all arms, whose models may state different defaults.
    found = resolve_data_config(vars(shared), pretrained_cfg=resolve_pretrained_cfg(model).to_dict())
    for name in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct'):
        value = found[name]
        setattr(shared, name, list(value) if isinstance(value, tuple) else value)
    return shared
