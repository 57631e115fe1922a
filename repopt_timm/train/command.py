"""The training command: one run, or search, scales, target and report in one call."""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..commands import PROGRAM
from ..files import write_text
from ..names import ModelName
from ..plot import plot_curves
from ..reporting import markdown_table
from .arguments import SEARCH_DEFAULTS
from .interruption import InterruptedRunError
from .parsing import parse_arguments
from .resolution import find_variant
from .run import Result, prepare_device, train
from .run_folder import LAST_CHECKPOINT, SCALES_FILE
from .validation import check_arguments

__all__ = ['continuation', 'main', 'set_up_logging']

_logger = logging.getLogger(__name__)

_QUICKSTART = (
    'Train RepOpt-VGG-A0 from unsearched scales on the handwritten digits of scikit-learn, in about a minute on a CPU. '
    f'With --search-first, a hyper-search of the scales comes before it. All arguments of {PROGRAM} train go here as '
    f'well, and replace those of the shipped config.'
)


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
    program = ['python', 'train.py'] if Path(sys.argv[0]).name == 'train.py' else [PROGRAM, command]
    quickstart = command == 'quickstart'
    words = ['-c', 'quickstart', *argv] if quickstart else argv
    args = parse_arguments(words, ' '.join(program), _QUICKSTART if quickstart else None)
    prepare_device(args)
    try:
        if args.search_first:
            _search_and_train(args)
        else:
            train(args)
    except InterruptedRunError as error:
        if args.rank == 0:
            folder = error.folder.parent if args.search_first else error.folder
            print(f'{error}: {continuation(program, argv, folder)}', file=sys.stderr)
        raise SystemExit(128 + error.signum) from None


def set_up_logging() -> None:
    """Shows what a run logs."""
    logging.basicConfig(level=logging.WARNING, format='%(message)s', force=True)
    logging.getLogger('repopt_timm').setLevel(logging.INFO)


def continuation(program: Sequence[str], argv: Sequence[str], folder: Path) -> str:
    """Says how a run that was interrupted goes on.

    Args:
        program: The command's own words.
        argv: Arguments that it was given.
        folder: Folder of the run.
    """
    words = [*program, *argv]
    if not any(folder.glob(f'**/{LAST_CHECKPOINT}')):
        return f'no epoch was finished; start again with  {shlex.join(words)}'
    # Later flags replace those before them: not from where this call began.
    for pair in (['--output', str(folder.parent)], ['--experiment', folder.name]):
        if f' {shlex.join(pair)} ' not in f' {shlex.join(words)} ':
            words += pair
    return f'continue with  {shlex.join([*words, "--resume"])}'


def _search_and_train(args: argparse.Namespace) -> None:
    """Searches, trains the target with what was found, and writes a report."""
    # Before the search, whose errors would name another model.
    find_variant(args.model)
    check_arguments(args)
    folder = Path(args.output) / (args.experiment or args.model)
    both = {**vars(args), 'output': str(folder), 'search_first': False}
    # These are for the target.
    ours = {
        'opt': 'sgd',
        'opt_kwargs': {},
        'pretrained': False,
        'initial_checkpoint': '',
        'init': '',
        **SEARCH_DEFAULTS,
    }
    model = ModelName.parse(args.model).of_kind('hs')
    search = train(argparse.Namespace(**{**both, **ours, 'model': model, 'experiment': 'search'}))
    scales = str(search.folder / SCALES_FILE)
    target = train(argparse.Namespace(**{**both, 'scales': scales, 'experiment': 'target'}))
    if args.rank == 0:
        _report(folder, {'search': search, 'target': target})


def _report(folder: Path, results: dict[str, Result]) -> None:
    cells = [
        [
            name,
            f'`{result.args.model}`',
            f'`{result.args.opt}`',
            str(len(result.history)),
            f'{result.history[-1]["eval_top1"]:.2f} %',
            f'{result.seconds:.0f} s',
        ]
        for name, result in results.items()
    ]
    table = markdown_table(['run', 'model', 'optimizer', 'epochs', 'top-1', 'time'], cells)
    write_text(folder / 'report.md', table + '\n')
    print(f'\n{table}\n')
    try:
        plot_curves({name: result.history for name, result in results.items()}, folder / 'curves.png')
    except ImportError as error:
        _logger.warning(f'No pictures: {error}')
    print(f'Both runs, with a report of each, are in {folder}')
