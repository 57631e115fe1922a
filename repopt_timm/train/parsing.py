"""From the command line and a YAML file to the arguments of a run."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..commands import PROGRAM
from ..console import CommandParser, Pairs, did_you_mean
from ..resources import resource_dir
from .arguments import add_arguments
from .timm_defaults import INSTEAD, TIMM_DEFAULTS

__all__ = ['ARGUMENTS', 'make_parser', 'parse_arguments', 'parse_with_config', 'read_config', 'write_config']

# What leads to a run, not what it is.
_NOT_IN_CONFIGS = ('resume', 'override', 'debug')


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
    args = parse_with_config(make_parser(program, description), argv)
    args.data_dir = vars(args).pop('data') or args.data_dir
    if args.data_dir and Path(args.data_dir).name in ('', '..'):
        # Cards record the folder's name.
        args.data_dir = str(Path(args.data_dir).resolve())
    return args


def parse_with_config(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line whose `-c` names a config, which replaces the defaults of the parser.

    Raises:
        FileNotFoundError: If the config does not exist.
        ValueError: If an argument is unknown, or its value is not one that it can have.
    """
    args = parser.parse_args(argv)
    for value in vars(args).values():
        if isinstance(value, str) and any('\ud800' <= character <= '\udfff' for character in value):
            raise ValueError(f'{value!a} is not UTF-8, which configs and reports are: rename the file or folder.')
    if args.config is None:
        return args
    parser.set_defaults(**read_config(args.config))
    return parser.parse_args(argv)


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
    _refuse_unknown(path, config)
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
        parser = CommandParser(prog=f'{PROGRAM} train')
        add_arguments(parser)
        parsed = vars(parser.parse_args(words))
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from None
    return {key: values[key] if key in values else parsed[key] for key in config if key in ARGUMENTS}


def _refuse_unknown(path: Path, config: dict[str, Any]) -> None:
    for key in _NOT_IN_CONFIGS:
        if config.get(key):
            raise ValueError(f"'{path}': '{key}' belongs on the command line, as --{key}; remove it from the file.")
    problems = []
    for key, value in config.items():
        if key in ARGUMENTS or value is None or value is False or value in ('', [], {}):
            continue
        if key not in TIMM_DEFAULTS:
            problems.append(f"unknown argument '{key}'.{did_you_mean(str(key), ARGUMENTS)}")
        elif value != TIMM_DEFAULTS[key]:
            advice = INSTEAD.get(key, "remove it, or train with timm's script")
            problems.append(f"'{key}: {value}' is not built here: {advice}")
    if problems:
        raise ValueError(f"'{path}': {'; '.join(problems)}")


def write_config(args: argparse.Namespace) -> str:
    """Writes the arguments of a run as YAML that `-c` reads."""
    kept = {name: _plain(getattr(args, name)) for name in ARGUMENTS if name not in _NOT_IN_CONFIGS}
    return yaml.safe_dump(kept, sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


class _UniqueKeys(yaml.SafeLoader):
    """YAML's own takes the last of two equal keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"'{key}' is given twice; keep one")
        return super().construct_mapping(node, deep)


def _actions() -> dict[str, argparse.Action]:
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    return {action.dest: action for action in parser._actions}


ARGUMENTS = _actions()
"""The arguments of a run by name, with `default`, `help` and `option_strings`."""
