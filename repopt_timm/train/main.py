"""The training command: one run, or search, scales, target and report in one call."""

import argparse
import copy
import logging
from collections.abc import Sequence
from pathlib import Path

from ..files import write_text
from ..plot import plot_curves, plot_scales
from ..scales import read_scale_file
from .arguments import parse_arguments
from .run import SCALES_FILE, Result, prepare_device, train

__all__ = ['main']

_logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the training command.

    Args:
        argv: Command-line arguments; those of the process when left out.

    Raises:
        ValueError: If arguments do not go together.
        FileNotFoundError: If a file that they name is not there.
    """
    logging.basicConfig(level=logging.WARNING, format='%(message)s', force=True)
    logging.getLogger('repopt_timm').setLevel(logging.INFO)
    args = parse_arguments(argv)
    prepare_device(args)
    if args.search_first:
        _search_and_train(args)
    else:
        train(args)


def _search_and_train(args: argparse.Namespace) -> None:
    """Searches, trains the target with what was found, and writes a report."""
    if args.scales:
        raise ValueError('--search-first searches the scales itself, so it does not go with --scales.')
    if args.resume and args.resume != 'auto':
        raise ValueError('--search-first is continued with --resume alone: it finds out itself how far it got.')
    needed = {'lr', 'weight_decay'}
    if not _is_sgd(args.opt or 'sgd') and 'opt' not in args.search_kwargs and not needed <= set(args.search_kwargs):
        raise ValueError(
            f'The search uses SGD, which the learning rate and weight decay of {args.opt} do not suit. Give it its '
            f'own, such as --search-kwargs lr=0.1 weight_decay=4e-5.'
        )
    experiment = args.experiment or args.model
    folder = Path(args.output) / experiment
    args.output, args.experiment = str(folder), 'target'
    search_args = copy.deepcopy(args)
    search_args.model, search_args.experiment, search_args.opt = f'{args.model.split(".")[0]}_hs', 'search', 'sgd'
    # These are for the target.
    search_args.pretrained, search_args.initial_checkpoint, search_args.opt_kwargs = False, '', {}
    for name, value in args.search_kwargs.items():
        setattr(search_args, 'data_dir' if name == 'data' else name, value)

    results = {'search': train(search_args)}
    args.scales = str(results['search'].folder / SCALES_FILE)
    results['target'] = train(args)
    if results['target'].history and search_args.rank == 0:
        _report(folder, {'search': search_args, 'target': args}, results)


def _is_sgd(opt: str) -> bool:
    return any(name in opt.lower() for name in ('sgd', 'momentum', 'nesterov'))


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
        plot_scales(scales, folder / 'scales.png', scales.title)
    except ImportError as error:
        _logger.warning(f'No pictures: {error}')
    print(f'Report, scales, checkpoints and pictures are in {folder}')
