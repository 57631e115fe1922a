"""The command line, `repopt-timm`."""

import importlib
import logging
import sys
from collections.abc import Sequence
from functools import partial
from io import TextIOWrapper

from . import __version__
from .commands import COMMANDS, PROGRAM
from .console import CommandParser, exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `repopt-timm` with the arguments of the process, or others; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # What follows `run` belongs to the script.
    ours = argv[:1] != ['run']
    for stream in (sys.stdout, sys.stderr) if ours else ():
        # A name that cannot be shown must not undo the work before it.
        if isinstance(stream, TextIOWrapper) and stream.errors == 'strict':
            stream.reconfigure(errors='backslashreplace')
    if ours:
        # Otherwise a library that warns would prefix our warnings with names of modules.
        logging.basicConfig(format='%(message)s')
    words = [word for word in argv if word != '--debug'] if ours else argv
    return exit_code(partial(_run, words), ours and '--debug' in argv)


def _run(argv: list[str]) -> None:
    name = argv[0] if argv else ''
    if name not in COMMANDS:
        parser = CommandParser(prog=PROGRAM, description='RepOpt-VGG and RepOptimizers for timm.')
        parser.add_argument('--version', action='version', version=f'{PROGRAM} {__version__}')
        commands = parser.add_subparsers(required=True, metavar='COMMAND')
        for each, command in COMMANDS.items():
            commands.add_parser(each, help=command.summary)
        parser.parse_args(argv)
        return
    module = importlib.import_module(COMMANDS[name].module, __package__)
    if name == 'quickstart':
        module.main(argv[1:], name)
    elif hasattr(module, 'main'):
        # It reads its arguments itself, such as a config that replaces defaults.
        module.main(argv[1:])
    else:
        parser = CommandParser(prog=PROGRAM)
        module.add_commands(parser.add_subparsers())
        args = parser.parse_args(argv)
        args.run(args)


if __name__ == '__main__':
    sys.exit(main())
