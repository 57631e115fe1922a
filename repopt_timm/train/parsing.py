"""From the command line and a YAML file to the arguments of a run."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..commands import PROGRAM
from ..console import CommandParser, Pairs, did_you_mean
from ..resources import resource_dir
from .arguments import add_arguments

__all__ = ['ARGUMENTS', 'make_parser', 'parse_arguments', 'read_config', 'write_config']

# What leads to a run, not what it is.
_NOT_IN_CONFIGS = ('resume', 'override', 'debug')

# Of timm's script, whose args.yaml holds all of its arguments: what is not built here, at its defaults that say
# something.
_TIMM_DEFAULTS = {
    'amp_impl': 'native',
    'aug_splits': 0,
    'epoch_repeats': 0.0,
    'eval_metric': 'top1',
    'kd_distill_type': 'logit',
    'kd_loss_type': 'kl',
    'kd_temperature': 4.0,
    'kd_token_distill_type': 'soft',
    'layer_decay_min_scale': 0,
    'local_rank': 0,
    'lr_cycle_decay': 0.5,
    'lr_cycle_limit': 1,
    'lr_cycle_mul': 1.0,
    'lr_k_decay': 1.0,
    'lr_noise_pct': 0.67,
    'lr_noise_std': 1.0,
    'naflex_loss_scale': 'linear',
    'naflex_max_seq_len': 576,
    'naflex_train_seq_lens': [128, 256, 576, 784, 1024],
    'recovery_interval': 0,
    'tta': 0,
    'worker_seeding': 'all',
}
_INSTEAD = {
    'drop_connect': 'give drop_path',
    'epoch_repeats': 'multiply epochs',
    'model_dtype': 'give amp and amp_dtype',
    'no_resume_opt': 'give initial_checkpoint, which takes the weights alone',
    'pretrained_path': 'give initial_checkpoint',
    'start_epoch': 'give --resume, which finds the epoch itself',
    'torchscript': 'give torchcompile',
}


def make_parser(program: str = 'train.py', description: str | None = None) -> CommandParser:
    """Makes the parser of `train.py` and `repopt-timm train`.

    Args:
        program: What its usage calls it.
        description: What it does.
    """
    parser = CommandParser(
        prog=program,
        description=description
        or 'Search scales (_hs models), validate them (_csla models), or train RepOpt-VGG, plain twins of other '
        'networks (repopt_* models) and any other timm model.',
    )
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of arguments, or a shipped name: quickstart')
    parser.add_argument('data', nargs='?', metavar='DIR', help='path to dataset (same as --data-dir)')
    add_arguments(parser)
    return parser


def parse_arguments(
    argv: Sequence[str] | None = None, program: str = 'train.py', description: str | None = None
) -> argparse.Namespace:
    """Parses the command line; values of the `-c` file replace the defaults.

    Args:
        argv: Command-line arguments. Defaults to those of the process.
        program: What errors and the usage call the command.
        description: What the usage says of it.

    Raises:
        FileNotFoundError: If the config does not exist.
        ValueError: If an argument is unknown, or its value is not one that it can have.
    """
    parser = make_parser(program, description)
    args = parser.parse_args(argv)
    for value in vars(args).values():
        if isinstance(value, str) and any('\ud800' <= character <= '\udfff' for character in value):
            raise ValueError(f'{value!a} is not UTF-8, which configs and reports are: rename the file or folder.')
    if args.config is not None:
        parser.set_defaults(**read_config(args.config))
        args = parser.parse_args(argv)
    args.data_dir = vars(args).pop('data') or args.data_dir
    if args.data_dir and Path(args.data_dir).name in ('', '..'):
        # Cards record the folder's name.
        args.data_dir = str(Path(args.data_dir).resolve())
    return args


def read_config(name: str) -> dict[str, Any]:
    """Reads a YAML file of arguments of a run, such as `args.yaml` in its folder or one that timm's script wrote.

    Args:
        name: A path, or the name of a config that ships with the package, without suffix.

    Returns:
        The arguments that it sets, by name. Those of timm's script that are not built here are left out if they are at
        timm's default.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a mapping, or sets what is not an argument of a run, or to a value that it cannot have.
    """
    shipped = resource_dir('configs')
    path = Path(name) if Path(name).is_file() else shipped / f'{name}.yaml'
    if not path.is_file():
        names = ', '.join(sorted(file.stem for file in shipped.glob('*.yaml')))
        raise FileNotFoundError(f"There is no config '{name}'. Give a YAML file, or one of those that ship: {names}.")
    try:
        config = yaml.load(path.read_text(encoding='utf-8'), _UniqueKeys)
    except (yaml.YAMLError, RecursionError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise ValueError(f"'{path}' is not a YAML file of 'argument: value' lines: {reason}") from None
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' holds a {type(config).__name__}, expected 'argument: value' lines.")
    folders = {value for value in (config.pop('data', None), config.get('data_dir')) if value}
    if len(folders) > 1:
        raise ValueError(f"'{path}' names two folders of data, {' and '.join(sorted(folders))}, expected one.")
    config |= {'data_dir': folders.pop()} if folders else {}
    if problems := [problem for key, value in config.items() if (problem := _problem(key, value))]:
        raise ValueError(f"'{path}': {'; '.join(problems)}")
    words = []
    values: dict[str, Any] = {}
    for key, value in config.items():
        if key not in ARGUMENTS or (value in (None, '') and key in ('resume', 'output')):
            continue
        action = ARGUMENTS[key]
        if value is None and (action.default is None or key == 'color_jitter'):
            values[key] = None
        elif isinstance(value, dict if isinstance(action, Pairs) else bool) and action.nargs in (0, '*'):
            values[key] = value
        elif action.nargs == 0:
            raise ValueError(f"'{path}': '{key}' is {value!r}, expected true or false.")
        else:
            flag = action.option_strings[-1]
            words += [flag, *map(str, value)] if isinstance(value, list) else [f'{flag}={value}']
    try:
        parsed = vars(_PARSER.parse_args(words))
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from None
    return {key: values[key] if key in values else parsed[key] for key in config if key in ARGUMENTS}


def _problem(key: Any, value: Any) -> str | None:
    """Returns what is wrong with a name in a config, or with a value of timm's script that is not built here."""
    if key in ARGUMENTS:
        belongs = key in _NOT_IN_CONFIGS and value
        return f"'{key}' belongs on the command line, as --{key}; remove it from the file" if belongs else None
    if value in (None, '', [], {}) or value is False or (key in _TIMM_DEFAULTS and value == _TIMM_DEFAULTS[key]):
        return None
    advice = _INSTEAD.get(key) or f"remove it, or train with timm's script.{did_you_mean(str(key), ARGUMENTS)}"
    return f"'{key}' ({value!r}) is not an argument here: {advice}"


def write_config(args: argparse.Namespace) -> str:
    """Writes the arguments of a run as YAML that `-c` reads."""
    kept = {name: getattr(args, name) for name in ARGUMENTS if name not in _NOT_IN_CONFIGS}
    # YAML has lists for tuples, and text for what it has no type for, as JSON does.
    return yaml.safe_dump(json.loads(json.dumps(kept, default=str)), sort_keys=False)


class _UniqueKeys(yaml.SafeLoader):
    """YAML's own takes the last of two equal keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"'{key}' is given twice; keep one")
        return super().construct_mapping(node, deep)


_PARSER = CommandParser(prog=f'{PROGRAM} train', add_help=False)
add_arguments(_PARSER)

ARGUMENTS = {action.dest: action for action in _PARSER._actions}
"""The arguments of a run by name, with `default`, `help` and `option_strings`."""
