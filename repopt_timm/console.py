"""How commands begin and end: arguments with a hint at what was meant, errors as one line, and the exit code."""

import argparse
import ast
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NoReturn

import yaml

from .errors import one_line

_INVALID_CHOICE = re.compile(r"argument ([^:]+): invalid choice: '(.*)' \(choose from (.*)\)", re.DOTALL)


class _HelpFormatter(argparse.HelpFormatter):
    """Ends a help with ` [default]`, unless it is of a switch or there is nothing to show."""

    def _get_help_string(self, action: argparse.Action) -> str:
        value: Any = action.default
        if isinstance(value, bool) or value in (None, '', {}, [], argparse.SUPPRESS):
            return action.help or ''
        words = [
            f'{each:g}' if isinstance(each, float) else str(each)
            for each in (value if isinstance(value, list | tuple) else [value])
        ]
        return f'{action.help} [{" ".join(words).replace("%", "%%")}]'

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return 'N' if callable(action.type) else super()._get_default_metavar_for_optional(action)


class CommandParser(argparse.ArgumentParser):
    """Raises a ValueError of one line instead of printing its usage and ending the process; its help shows defaults."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{'formatter_class': _HelpFormatter, **kwargs})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parses; a flag that this parser does not have is an error here, where its own are known."""
        words, flags = list(sys.argv[1:] if args is None else args), self._option_string_actions
        # A parser with subcommands does not know their flags.
        for word in () if self._subparsers else words:
            flag = word.partition('=')[0]
            if flag.startswith('--') and not any(known.startswith(flag) for known in flags):
                # Checked first, because a missing required argument may be the mistyped one.
                self.error(f"unknown argument '{word}'.{did_you_mean(flag, flags)}")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises the error, with the nearest choice to one that does not exist."""
        if match := _INVALID_CHOICE.fullmatch(message):
            argument, value, choices = match.groups()
            near = did_you_mean(value, [choice.strip("' ") for choice in choices.split(',')])
            kind = argument.lower() if argument.isupper() else f'value of {argument}'
            message = f"unknown {kind} '{value}'." + (near or f' Expected one of {choices}.')
        end = '' if message.endswith(('.', '?')) else '.'
        raise ValueError(f'{message}{end} `{self.prog} --help` says more.')


def number(
    kind: type,
    low: float = -math.inf,
    high: float | None = None,
    above: float = -math.inf,
    below: float = math.inf,
) -> Callable[[str], Any]:
    """Makes the argparse type of a finite number, `int` or `float`; integers have 32 bits unless `high` says more."""
    high = high if high is not None else 2**31 - 1 if kind is int else math.inf
    limits = {'at least': low, 'above': above, 'at most': high, 'below': below}
    expected = ' and '.join(f'{word} {limit:.10g}' for word, limit in limits.items() if math.isfinite(limit))

    def parse(text: str) -> Any:
        value = kind(text)
        if not (low <= value <= high and above < value < below and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f'{text} is not a number {expected}'.rstrip())
        return value

    # argparse names it in its own error.
    parse.__name__ = kind.__name__
    return parse


class Pairs(argparse.Action):
    """Collects K=V words in a dict. A value is a Python literal, as in timm's script, or else a YAML scalar."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pairs: dict[str, Any] = {}
        for word in values:
            key, separator, text = word.partition('=')
            if not (key and separator):
                raise argparse.ArgumentError(self, f"expected K=V, such as name=value, but got '{word}'")
            if key in pairs:
                raise argparse.ArgumentError(self, f"'{key}' is given twice")
            pairs[key] = text
            for read in (ast.literal_eval, yaml.safe_load):
                with suppress(ValueError, SyntaxError, MemoryError, RecursionError, yaml.YAMLError):
                    pairs[key] = read(text)
                    break
        setattr(namespace, self.dest, pairs)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean '...'?` with the nearest of the known words; nothing if none is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" Did you mean '{near[0]}'?" if near else ''


def exit_code(run: Callable[[], None], debug: bool = False) -> int:
    """Runs a command, and prints an error as one line unless it is debugged.

    Returns 0; 1 after an error; 130 after Ctrl-C; 141 if what read the output ended, as `head` does.
    """
    try:
        try:
            run()
        finally:
            print(end='', flush=True)
    except KeyboardInterrupt:
        print('Interrupted.', file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            try:
                print(flush=True)
            except BrokenPipeError:
                # The interpreter would try again at its end, and complain.
                sys.stdout = None  # type: ignore[assignment]
                return 141
        if debug:
            raise
        print(f'error: {one_line(error)}', file=sys.stderr)
        return 1
    return 0
