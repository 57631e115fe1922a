"""From the command line and a YAML file to the arguments of a run."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..commands import PROGRAM
from ..console import CommandParser, Pairs, did_you_mean
from ..sources import resource_dir
from .arguments import add_arguments

# How a run is started, not what it trains.
_NOT_IN_CONFIGS = ('resume', 'override', 'debug')

# Defaults of arguments of timm's script that are not built here: its args.yaml holds them all.
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
    'input_img_mode': 'give in_chans',
    'model_dtype': 'give amp and amp_dtype',
    'no_resume_opt': 'give initial_checkpoint, which takes the weights alone',
    'pretrained_path': 'give initial_checkpoint',
    'torchscript': 'give torchcompile',
}
_DESCRIPTION = (
    'Search scales (_hs models), validate them (_csla models), or train RepOpt-VGG, plain twins of other networks '
    '(repopt_* models) and any other timm model.'
)


def make_parser(program: str = f'{PROGRAM} train', description: str = _DESCRIPTION) -> CommandParser:
    """Makes the parser of `train.py` and `repopt-timm train`."""
    parser = CommandParser(prog=program, description=description)
    parser.add_argument(
        '-c', '--config', metavar='FILE', help='YAML file of arguments, or a shipped one, such as quickstart'
    )
    parser.add_argument('data', nargs='?', metavar='DIR', help='path to dataset (same as --data-dir)')
    add_arguments(parser)
    return parser


def parse_arguments(argv: Sequence[str] | None = None, parser: CommandParser | None = None) -> argparse.Namespace:
    """Parses the command line, of the process by default; values of the `-c` file replace the defaults."""
    parser = parser or make_parser()
    args = parser.parse_args(argv)
    if args.config is not None:
        parser.set_defaults(**read_config(args.config))
        args = parser.parse_args(argv)
    args.data_dir = vars(args).pop('data') or args.data_dir
    try:
        (args.data_dir or '').encode()
    except UnicodeEncodeError:
        raise ValueError(f'{args.data_dir!a} is not UTF-8, which configs and reports are: rename the folder.') from None
    if args.data_dir and Path(args.data_dir).name in ('', '..'):
        # Cards record the folder's name.
        args.data_dir = str(Path(args.data_dir).resolve())
    return args


def read_config(name: str) -> dict[str, Any]:
    """Reads the arguments of a run from a YAML file: its `args.yaml`, one of timm's script, or one that ships."""
    shipped = resource_dir('configs')
    path = Path(name) if Path(name).is_file() else shipped / f'{name}.yaml'
    if not path.is_file():
        names = ', '.join(sorted(file.stem for file in shipped.glob('*.yaml')))
        raise FileNotFoundError(f"There is no config '{name}'. Give a YAML file, or one of those that ship: {names}.")
    try:
        config = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, RecursionError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise ValueError(f"'{path}' is not a YAML file of 'argument: value' lines: {reason}") from None
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' holds a {type(config).__name__}, expected 'argument: value' lines.")
    if folder := config.pop('data', None):
        config['data_dir'] = config.get('data_dir') or folder
    problems, args = [], {}
    for key, value in config.items():
        if key not in ARGUMENTS:
            default = value in (None, '', [], {}) or value is False
            if not default and not (key in _TIMM_DEFAULTS and value == _TIMM_DEFAULTS[key]):
                hint = f"remove it, or train with timm's script.{did_you_mean(str(key), ARGUMENTS)}"
                problems.append(f"'{key}' ({value!r}) is not an argument here: {_INSTEAD.get(key, hint)}")
        elif key in _NOT_IN_CONFIGS and value:
            problems.append(f"'{key}' belongs on the command line, as --{key}; remove it from the file")
        else:
            try:
                args[key] = _parsed(key, value)
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ValueError(f"'{path}': {'; '.join(problems)}")
    return args


def _parsed(key: str, value: Any) -> Any:
    """Returns a value as the command line would have it; null is a default, or no color jitter."""
    action = ARGUMENTS[key]
    if value is None and key == 'color_jitter':
        return None
    if value in (None, '') and (key in ('resume', 'output') or action.default in (None, '', {})):
        return action.default
    if action.nargs in (0, '*') and isinstance(value, dict if isinstance(action, Pairs) else bool):
        return value
    if action.nargs == 0:
        raise ValueError(f"'{key}' is {value!r}, expected true or false.")
    flag = action.option_strings[-1]
    words = [flag, *map(str, value)] if isinstance(value, list) else [f'{flag}={value}']
    return vars(_PARSER.parse_args(words))[key]


def write_config(args: argparse.Namespace) -> str:
    """Writes the arguments of a run as YAML that `-c` reads."""
    kept = {name: getattr(args, name) for name in ARGUMENTS if name not in _NOT_IN_CONFIGS}
    # YAML has lists for tuples, and text for what it has no type for, as JSON does.
    return yaml.safe_dump(json.loads(json.dumps(kept, default=str)), sort_keys=False)


_PARSER = CommandParser(prog=f'{PROGRAM} train', add_help=False)
add_arguments(_PARSER)

ARGUMENTS = {action.dest: action for action in _PARSER._actions}
"""The arguments of a run by name, with `default`, `help` and `option_strings`."""
