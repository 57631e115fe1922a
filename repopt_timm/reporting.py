"""What commands measure and print alike: results, Markdown tables, the machine's name, timing in turns."""

import argparse
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from .commands import COMMANDS

_T = TypeVar('_T')


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str = ''
) -> argparse.ArgumentParser:
    """Adds a command that prints its result with `print_result`; its help is `summary`, or that of `COMMANDS`."""
    summary = summary or COMMANDS[name].summary
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + '.')
    parser.add_argument('--json', action='store_true', help='print JSON, for programs')
    parser.set_defaults(run=run)
    return parser


def print_result(args: argparse.Namespace, values: dict[str, Any], text: str) -> None:
    """Prints a command's result: `values` as JSON if `args.json` is set, else `text`."""
    print(json.dumps(values, indent=2) if args.json else text)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], align: bool = False) -> str:
    """Formats a Markdown table; `align` pads its cells, so that columns line up in a terminal."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) if align else 0 for column in zip(*lines)]
    lines.insert(1, ['-' * (width or 3) for width in widths])
    return '\n'.join(f'| {" | ".join(map(str.ljust, line, widths))} |' for line in lines)


def cpu_name() -> str:
    """Returns the name of the CPU."""
    names = [line.partition(':')[2].strip() for line in _cpu_info().splitlines() if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def lacks_vnni() -> bool:
    """Returns whether this is an x86 CPU without VNNI instructions; False if its flags are unknown."""
    flags = _cpu_info().split()
    return 'sse2' in flags and not any('vnni' in flag for flag in flags)


def _cpu_info() -> str:
    try:
        return Path('/proc/cpuinfo').read_text(encoding='utf-8')
    except OSError:
        return ''


def package_versions(*packages: ModuleType) -> dict[str, str]:
    """Returns the versions of packages by name."""
    # As plain text, which torch.load restores without running code.
    return {package.__name__: str(package.__version__) for package in packages}


def take_turns(turns: Mapping[str, Callable[[], _T]], rounds: int, warmup: int = 0) -> dict[str, list[_T]]:
    """Measures candidates in rounds, each candidate once per round, and drops the first `warmup` rounds.

    Whatever slows down the machine for a while slows down a whole round, so ratios within a round stay meaningful. The
    order rotates, so that no candidate always inherits the caches of the same other one.
    """
    names = list(turns)
    found: dict[str, list[_T]] = {name: [] for name in names}
    for index in range(warmup + rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(turns[name]())
    return {name: values[warmup:] for name, values in found.items()}
