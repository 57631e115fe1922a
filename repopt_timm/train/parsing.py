"""From the command line and a YAML file to checked arguments of a run."""

import argparse
import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..console import CommandParser, default_text, did_you_mean
from ..resources import resource_dir
from .argument import Argument
from .schema import ARGUMENTS, SECTIONS

__all__ = [
    'add_argument',
    'configured_arguments',
    'given_arguments',
    'make_parser',
    'parse_arguments',
    'read_config',
    'search_arguments',
    'write_config',
]

_MAX_CONFIG = 1 << 20

# What leads to a run, not what it is.
_NOT_IN_CONFIGS = ('resume', 'override', 'debug')


def make_parser(program: str = 'train.py') -> argparse.ArgumentParser:
    """Makes the parser of `train.py` and `repopt-timm train`; it gives texts, and only what is on the command line.

    Args:
        program: What its usage calls it.
    """
    parser = CommandParser(
        prog=program,
        description='Search scales (_hs models), validate them (_csla models), or train RepOpt-VGG, plain twins of '
        'other networks (repopt_* models) and any other timm model.',
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        '-c', '--config', metavar='FILE', help='YAML file of arguments, or the name of a shipped one such as quickstart'
    )
    parser.add_argument('data', nargs='?', metavar='DIR', help='path to dataset (same as --data-dir)')
    for title, section in SECTIONS.items():
        group = parser.add_argument_group(title)
        for argument in section:
            add_argument(group, argument)
    return parser


def add_argument(group: Any, argument: Argument) -> None:
    """Adds an argument to a parser, which gives its text."""
    names = [*([argument.short] if argument.short else []), argument.flag]
    text = argument.help.replace('%', '%%')
    if argument.kind is bool:
        group.add_argument(*names, action='store_true', help=text)
        return
    if argument.choices and argument.metavar is None:
        text += f' ({", ".join(choice or repr("") for choice in argument.choices)})'
    text += default_text(argument.default).replace('%', '%%')
    options: dict[str, Any] = {'help': text, 'metavar': argument.metavar}
    if argument.kind is dict:
        options['nargs'] = '*'
    elif argument.count:
        options['nargs'] = argument.count[0] if len(argument.count) == 1 else '+'
    elif argument.const is not None:
        options |= {'nargs': '?', 'const': argument.const}
    group.add_argument(*names, **options)


def read_config(name: str) -> dict[str, Any]:
    """Reads a YAML file of arguments.

    Args:
        name: A path, or the name of a config that ships with the package, without suffix.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not one YAML document of text keys, each of them once.
    """
    shipped = resource_dir('configs')
    path = Path(name) if Path(name).is_file() else shipped / f'{name}.yaml'
    if not path.is_file():
        names = ', '.join(sorted(file.stem for file in shipped.glob('*.yaml')))
        raise FileNotFoundError(f"There is no config '{name}'. Give a YAML file, or one of those that ship: {names}.")
    try:
        problem = f'it has more than {_MAX_CONFIG} bytes' if path.stat().st_size > _MAX_CONFIG else None
        text = path.read_text(encoding='utf-8') if problem is None else ''
        config = yaml.load(text, _Loader) if problem is None else {}
    except UnicodeDecodeError:
        raise ValueError(f"'{path}' is not UTF-8 text, expected a YAML file of 'argument: value' lines.") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"'{path}' is not a YAML file of 'argument: value' lines: {_yaml_problem(error)}.") from None
    if problem is not None:
        raise ValueError(f"'{path}' is not a YAML file of 'argument: value' lines: {problem}.")
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' holds a {type(config).__name__}, expected 'argument: value' lines.")
    return config


class _Loader(yaml.SafeLoader):
    """YAML's own takes the last of two equal keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f'the key {key!r} is not text; quote it', key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key}' is given twice; keep one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return 'it is nested too deeply'
    if isinstance(error, yaml.MarkedYAMLError):
        line = f'line {error.problem_mark.line + 1}: ' if error.problem_mark else ''
        if (error.context or '').startswith('expected a single document'):
            return f'{line}it has more than one document, expected one'
        return f'{line}{error.problem}'
    return ' '.join(str(error).split())


def _argument(name: str, where: str) -> Argument:
    if name not in ARGUMENTS:
        raise ValueError(f"{where}: unknown argument '{name}'.{did_you_mean(name, ARGUMENTS)}")
    return ARGUMENTS[name]


def given_arguments(namespace: argparse.Namespace) -> dict[str, Any]:
    """Checks what is on the command line, and returns the values by name.

    Raises:
        ValueError: If an argument is not one of a run, or its value is not one that it can have.
    """
    texts = vars(namespace)
    texts.pop('config', None)
    folder = texts.pop('data', None)
    given = {name: _argument(name, 'train').parse(text, ARGUMENTS[name].flag) for name, text in texts.items()}
    if folder is None:
        return given
    return _with_data(given, ARGUMENTS['data_dir'].parse(folder, 'The folder of images'), 'The command line')


def configured_arguments(name: str) -> dict[str, Any]:
    """Checks what a config sets, and returns the values by name; see `read_config`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it sets what is not an argument of a run, or to a value that this cannot have.
    """
    config = read_config(name)
    folder = config.pop('data', None)
    for key in _NOT_IN_CONFIGS:
        if key in config:
            raise ValueError(f"{name}: '{key}' belongs on the command line, as --{key}; remove it from the file.")
    values = {key: _argument(key, name).check(value, f"{name}: '{key}'") for key, value in config.items()}
    return (
        values if folder is None else _with_data(values, ARGUMENTS['data_dir'].check(folder, f"{name}: 'data'"), name)
    )


def _with_data(values: dict[str, Any], folder: str, where: str) -> dict[str, Any]:
    if values.get('data_dir', folder) != folder:
        raise ValueError(f"{where} names two folders of data, '{folder}' and '{values['data_dir']}', expected one.")
    return {**values, 'data_dir': folder}


def parse_arguments(argv: Sequence[str] | None = None, program: str = 'train.py') -> argparse.Namespace:
    """Parses the command line; values of the `-c` file replace the defaults.

    Args:
        argv: Command-line arguments. Defaults to those of the process.
        program: What errors and the usage call the command.

    Raises:
        FileNotFoundError: If the config does not exist.
        ValueError: If an argument is unknown, or its value is not one that it can have.
    """
    namespace = make_parser(program).parse_args(argv)
    config_name = getattr(namespace, 'config', None)
    values = {name: copy.deepcopy(argument.default) for name, argument in ARGUMENTS.items()}
    if config_name is not None:
        values |= configured_arguments(config_name)
    values |= given_arguments(namespace)
    values['search_kwargs'] = search_arguments(values['search_kwargs'])
    if values['data_dir'] and Path(values['data_dir']).name in ('', '..'):
        # Cards record the folder's name.
        values['data_dir'] = os.path.abspath(values['data_dir'])
    return argparse.Namespace(config=config_name, **values)


def search_arguments(pairs: dict[str, Any]) -> dict[str, Any]:
    """Checks the values of `--search-kwargs`, which are arguments of a run."""
    checked = {}
    for key, value in pairs.items():
        argument = _argument('data_dir' if key == 'data' else key, '--search-kwargs')
        if argument.kind is str and isinstance(value, int | float):
            # On the command line a folder called 2024 looks like a number.
            value = str(value)
        if argument.count and isinstance(value, tuple):
            value = list(value)
        checked[argument.name] = argument.check(value, f'--search-kwargs {key}')
    return checked


def write_config(args: argparse.Namespace) -> str:
    """Writes the arguments of a run as YAML that `-c` reads."""
    kept = {name: getattr(args, name) for name in ARGUMENTS if name not in _NOT_IN_CONFIGS}
    return yaml.safe_dump({name: _plain(value) for name, value in kept.items()}, sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
