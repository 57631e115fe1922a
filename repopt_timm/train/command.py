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
from ..reporting import markdown_table
from .arguments import SEARCH_DECAY
from .interruption import InterruptedRunError
from .parsing import make_parser, parse_arguments
from .resolution import find_variant
from .run import prepare_device, train
from .run_folder import LAST_CHECKPOINT, REPORT_FILE, SCALES_FILE
from .validation import check_arguments

_QUICKSTART = (
    'Train RepOpt-VGG-A0 from unsearched scales on the handwritten digits of scikit-learn, in about a minute on a CPU. '
    f'With --search-first, a hyper-search of the scales comes before it. All arguments of {PROGRAM} train go here as '
    f'well, and replace those of the shipped config.'
)


def main(argv: Sequence[str], command: str = 'train') -> None:
    """Runs `train`, or `quickstart`, which is `train` with the config of this name.

    Raises:
        SystemExit: With 128 plus the signal's number if Ctrl-C or SIGTERM ended the run.
    """
    logging.basicConfig(level=logging.WARNING, format='%(message)s', force=True)
    logging.getLogger('repopt_timm').setLevel(logging.INFO)
    program = ['python', 'train.py'] if Path(sys.argv[0]).name == 'train.py' else [PROGRAM, command]
    if command == 'quickstart':
        args = parse_arguments(['-c', 'quickstart', *argv], make_parser(' '.join(program), _QUICKSTART))
    else:
        args = parse_arguments(argv, make_parser(' '.join(program)))
    prepare_device(args)
    try:
        if args.search_first:
            _search_and_train(args)
        else:
            train(args)
    except InterruptedRunError as error:
        if args.rank == 0:
            folder = error.folder.parent if args.search_first else error.folder
            print(f'{error}: {_continuation([*program, *argv], folder)}', file=sys.stderr)
        raise SystemExit(128 + error.signum) from None


def _continuation(words: list[str], folder: Path) -> str:
    """Says how a run that was interrupted goes on."""
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
    model = ModelName.parse(args.model).of_kind('hs')
    # What else is given is for the target.
    ours = {'opt': 'sgd', 'opt_kwargs': {}, 'weight_decay': SEARCH_DECAY}
    ours |= {'pretrained': False, 'initial_checkpoint': '', 'init': ''}
    search = train(argparse.Namespace(**{**both, **ours, 'model': model, 'experiment': 'search'}))
    scales = str(search.folder / SCALES_FILE)
    target = train(argparse.Namespace(**{**both, 'scales': scales, 'experiment': 'target'}))
    if args.rank > 0:
        return
    cells = [
        [
            run.folder.name,
            f'`{run.args.model}`',
            f'`{run.args.opt}`',
            str(len(run.history)),
            f'{run.history[-1]["eval_top1"]:.2f} %',
            f'{run.seconds:.0f} s',
        ]
        for run in (search, target)
    ]
    table = markdown_table(['run', 'model', 'optimizer', 'epochs', 'top-1', 'time'], cells)
    write_text(folder / REPORT_FILE, table + '\n')
    print(f'\n{table}\n\nBoth runs, with a report of each, are in {folder}')
