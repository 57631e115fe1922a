"""The training command: one run, or search, scales, target and report in one call."""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.read import LAST_CHECKPOINT
from ..commands import PROGRAM
from ..names import ModelName
from .arguments import SEARCH_DECAY
from .interruption import InterruptedRunError
from .parsing import make_parser, parse_arguments
from .resolution import resolve
from .run import prepare_device, train
from .run_folder import SCALES_FILE
from .validation import check_arguments

_QUICKSTART = (
    'Train RepOpt-VGG-A0 from unsearched scales on the handwritten digits of scikit-learn, in one or two minutes on '
    f'a CPU. With --search-first, a hyper-search of the scales comes before it. All arguments of {PROGRAM} train go '
    f'here as well, and replace those of the shipped config.'
)


def main(argv: Sequence[str], command: str = 'train') -> None:
    """Runs `train`, or `quickstart`, which is `train` with the config of this name."""
    logging.basicConfig(level=logging.WARNING, format='%(message)s', force=True)
    logging.getLogger('repopt_timm').setLevel(logging.INFO)
    program = ['python', sys.argv[0]] if Path(sys.argv[0]).name == 'train.py' else [PROGRAM, command]
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
            what, more = 'no epoch was finished; start again with', []
            if any(folder.glob(f'**/{LAST_CHECKPOINT}')):
                what = 'continue with'
                # Later flags replace those before them: not from where this call began.
                more = ['--output', str(folder.parent), '--experiment', folder.name, '--resume']
            # Only torchrun knows its own arguments.
            command = 'your torchrun command' if args.distributed else shlex.join([*program, *argv])
            print(f'{error}: {what}  {" ".join([command, *map(shlex.quote, more)])}', file=sys.stderr)
        raise SystemExit(128 + error.signum) from None


def _search_and_train(args: argparse.Namespace) -> None:
    """Searches, and trains the target with what was found."""
    # Before the search, whose errors would name another model.
    check_arguments(args)
    folder = Path(args.output) / (args.experiment or args.model)
    both = {**vars(args), 'output': str(folder), 'search_first': False}
    resolve(argparse.Namespace(**{**both, 'experiment': 'target'}), choose_scales=False)
    model = ModelName.parse(args.model).of_kind('hs')
    # What else is given is for the target.
    ours = {'opt': 'sgd', 'opt_kwargs': {}, 'weight_decay': SEARCH_DECAY}
    ours |= {'pretrained': False, 'initial_checkpoint': '', 'init': ''}
    search = train(argparse.Namespace(**{**both, **ours, 'model': model, 'experiment': 'search'}))
    train(argparse.Namespace(**{**both, 'scales': str(search / SCALES_FILE), 'experiment': 'target'}))
    if args.rank == 0:
        print(f'Both runs, with a report of each, are in {folder}')
