"""The training command: one run, or search, scales, target and report in one call."""

import argparse
import copy
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..commands import PROGRAM
from ..console import CommandParser
from ..files import write_text
from ..models.initial_values import initial_values
from ..names import ModelName
from ..plot import plot_curves, plot_scales
from ..scales import read_scale_file
from .interruption import InterruptedRunError
from .parsing import parse_arguments
from .run import Result, prepare_device, train
from .run_folder import LAST_CHECKPOINT, SCALES_FILE
from .run_model import find_variant
from .schema import SEARCH_DEFAULTS
from .validation import check_arguments

__all__ = ['continuation', 'main', 'set_up_logging']

_logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, command: str = 'train') -> None:
    """Runs the training command.

    Args:
        argv: Command-line arguments. Defaults to those of the process.
        command: `train`, or `quickstart` for training with the config of this name.

    Raises:
        ValueError: If arguments do not go together, or the training diverges.
        FileNotFoundError: If a file that they name does not exist.
        ImportError: If they need a package that is not installed.
        OSError: If a checkpoint cannot be written.
        SystemExit: With 128 plus the signal's number if Ctrl-C or SIGTERM ended the run.
    """
    set_up_logging()
    argv = list(sys.argv[1:] if argv is None else argv)
    if command == 'quickstart':
        if {'-h', '--help'} & set(argv):
            _quickstart_parser().parse_args(['--help'])
        argv = ['-c', command, *argv]
    args = parse_arguments(argv, ' '.join(_program()))
    prepare_device(args)
    search_first = args.search_first
    try:
        if search_first:
            _search_and_train(args)
        else:
            train(args)
    except InterruptedRunError as error:
        if args.rank == 0:
            # The name that a run without one got; search and target have theirs from the model.
            experiment = '' if search_first else args.experiment
            print(f'{error}: continue with  {continuation(_program(), argv, args, experiment)}', file=sys.stderr)
        raise SystemExit(128 + error.signum) from None


def _quickstart_parser() -> CommandParser:
    """Makes the parser of a help in a few lines."""
    return CommandParser(
        prog=f'{PROGRAM} quickstart',
        usage='%(prog)s [ARGUMENT ...]',
        description='Train RepOpt-VGG-A0 from unsearched scales on the handwritten digits of scikit-learn, in about a '
        'minute on a CPU. With --search-first, a hyper-search of the scales comes before it.',
        epilog=f'All arguments of {PROGRAM} train go here as well, such as --epochs or --output, and replace those of '
        f'the shipped config: see {PROGRAM} train --help.',
    )


def set_up_logging() -> None:
    """Shows what a run logs."""
    logging.basicConfig(level=logging.WARNING, format='%(message)s', force=True)
    logging.getLogger('repopt_timm').setLevel(logging.INFO)


def continuation(program: Sequence[str], argv: Sequence[str], args: argparse.Namespace, experiment: str) -> str:
    """Returns the command that continues a run.

    Args:
        program: The command's own words.
        argv: Arguments that it was given.
        args: The same, parsed.
        experiment: Name of the run's folder; empty if the arguments imply it.
    """
    words = [*program, *argv, *([] if args.resume else ['--resume'])]
    if args.resume in (None, 'auto'):
        if experiment and not any(word.startswith('--exp') for word in argv):
            words += ['--experiment', experiment]
    else:
        # Not from where this call began.
        last = str(Path(args.resume).with_name(LAST_CHECKPOINT))
        for index, word in enumerate(words):
            if word == args.resume or (word.startswith('--res') and word.endswith(f'={args.resume}')):
                words[index] = word.removesuffix(args.resume) + last
    return shlex.join(words)


def _program() -> list[str]:
    return ['python', 'train.py'] if Path(sys.argv[0]).name == 'train.py' else [PROGRAM, 'train']


def _search_and_train(args: argparse.Namespace) -> None:
    """Searches, trains the target with what was found, and writes a report."""
    check_arguments(args)
    # Before the search, whose error would name another model.
    find_variant(args.model)
    experiment = args.experiment or args.model
    folder = Path(args.output) / experiment
    search_kwargs = args.search_kwargs
    args.output, args.experiment, args.search_first, args.search_kwargs = str(folder), 'target', False, {}
    search_args = copy.deepcopy(args)
    search_args.model = ModelName.parse(args.model).of_kind('hs')
    search_args.experiment, search_args.opt = 'search', 'sgd'
    # These are for the target.
    search_args.pretrained, search_args.initial_checkpoint, search_args.opt_kwargs = False, '', {}
    vars(search_args).update(SEARCH_DEFAULTS | search_kwargs)

    results = {'search': train(search_args)}
    args.scales = str(results['search'].folder / SCALES_FILE)
    results['target'] = train(args)
    if results['target'].history and search_args.rank == 0:
        _report(folder, {'search': search_args, 'target': args}, results)


def _report(folder: Path, arguments: dict[str, argparse.Namespace], results: dict[str, Result]) -> None:
    lines = ['| run | model | optimizer | epochs | top-1 | time |', '|---|---|---|---|---|---|']
    for name, result in results.items():
        args = arguments[name]
        top1 = f'{result.history[-1]["eval_top1"]:.2f} %'
        cells = (name, f'`{args.model}`', f'`{args.opt}`', len(result.history), top1, f'{result.seconds:.0f} s')
        lines.append('| ' + ' | '.join(str(cell) for cell in cells) + ' |')
    table = '\n'.join(lines)
    write_text(folder / 'report.md', table + '\n')
    print(f'\n{table}\n')
    scales = read_scale_file(results['search'].folder / SCALES_FILE)
    try:
        plot_curves({name: result.history for name, result in results.items()}, folder / 'curves.png')
        plot_scales(scales, folder / 'scales.png', scales.title, initial_values(scales))
    except ImportError as error:
        _logger.warning(f'No pictures: {error}')
    print(f'Report, scales, checkpoints and pictures are in {folder}')
