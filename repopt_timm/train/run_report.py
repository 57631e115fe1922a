"""Writes the files of a finished run: `report.md` with pictures and the next commands, and the scales of a search."""

import argparse
import logging
import shlex
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoints.read import checkpoint_of
from ..commands import PROGRAM
from ..datasets import class_names
from ..files import write_text
from ..models.initial_values import initial_values
from ..names import ModelName
from ..plot import plot_curves, plot_scales
from ..reparam import kind_of
from ..reporting import markdown_table
from ..scales import Scales, scales_table
from ..scales.summary import movement
from .engine import TrainState, ranked
from .loaders import image_folder
from .run_checkpoints import versions
from .run_folder import ARGUMENTS_FILE, REPORT_FILE, SCALES_FILE

_logger = logging.getLogger(__name__)

_MOST_CLASSES = 50


def save_searched(
    model: nn.Module, started: Scales, folder: Path, args: argparse.Namespace, history: Sequence[dict[str, Any]]
) -> None:
    """Writes the scales of a search with their provenance, and says how far they moved."""
    provenance = {
        'method': 'hyper-search',
        'dataset': _data_of(args),
        'epochs': len(history),
        'top1': round(history[-1]['eval_top1'], 3),
        'top5': round(history[-1]['eval_top5'], 3),
        'seed': args.seed,
        'input_size': list(args.input_size),
        'batch_size': args.batch_size * args.world_size * args.grad_accum_steps,
        'lr': args.lr,
        'weight_decay': args.weight_decay,
        'optimizer': args.opt,
        'versions': versions(),
        'date': f'{datetime.now(timezone.utc):%Y-%m-%d}',
    }
    stated = ('clip_grad', 'train_images', 'model_kwargs')
    provenance |= {name: getattr(args, name) for name in stated if getattr(args, name)}
    scales = Scales.from_model(model, provenance)
    scales.save(folder / SCALES_FILE)
    _logger.info(f'Scales {scales.fingerprint[:12]} are in {folder / SCALES_FILE}')
    _logger.info(movement([scales], started).sentence())


def _data_of(args: argparse.Namespace) -> str:
    return args.dataset or Path(args.data_dir).name


def write_report(
    folder: Path, model: nn.Module, args: argparse.Namespace, state: TrainState, seconds: float, dataset: Any
) -> None:
    """Writes `report.md` and its pictures, and logs the result and the next command."""
    history, search = state.history, kind_of(model) == 'hs'
    top1 = f'top-1 {history[-1]["eval_top1"]:.2f} % after {len(history)} epochs'
    for row in ranked(history)[:1]:
        top1 += f', at best {row["eval_top1"]:.2f} % after epoch {row["epoch"] + 1}'
    sections = [
        f'# {folder.name}',
        f'`{args.model}` with `{args.opt}` on {_data_of(args)}: {top1}; the last call took {seconds:.0f} s.',
        '## Command',
        _shell(f'{PROGRAM} train -c {shlex.quote(str(folder / ARGUMENTS_FILE))} --experiment again'),
        f'`{ARGUMENTS_FILE}` holds all arguments. Versions: {", ".join(f"{k} {v}" for k, v in versions().items())}.',
        '## Curves',
        '![Training loss and accuracy against epochs](curves.png)',
        _rows(history),
    ]
    scales = started = None
    # A network may have no scales, and they may have no known start.
    with suppress(ValueError):
        scales = Scales.from_model(model)
        started = initial_values(scales)
    if scales is not None:
        moved = [movement([scales], started).sentence()] if search and started is not None else []
        sections += ['## Scales', f'Fingerprint `{scales.fingerprint}`.', *moved, _compared(scales, started)]
        sections += ['![Scales against depth, and what they start from](scales.png)']
    names = class_names(dataset)
    if state.predictions is not None and names:
        sections += _classes(folder, state.predictions, names)
    lines = _next(folder, args, search)
    sections += ['## Next', _shell(*lines)]
    try:
        plot_curves({args.model: history}, folder / 'curves.png')
        if scales is not None:
            plot_scales(scales, folder / 'scales.png', scales.title, started)
    except ImportError as error:
        _logger.warning(f'The report has no pictures: {error}')
        sections = [section for section in sections if not section.startswith('![')]
    write_text(folder / REPORT_FILE, '\n\n'.join(sections) + '\n')
    _logger.info(f'{folder / REPORT_FILE}: {top1}. Next:  {lines[0]}')


def _rows(history: Sequence[dict[str, Any]]) -> str:
    columns = [name for name in ('lr', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5') if name in history[-1]]
    # The last one, and as many before it as a reader looks at.
    shown = history[:: -len(history) // 20][::-1]
    cells = [[str(row['epoch'] + 1), *(f'{row[name]:.4g}' if name in row else '' for name in columns)] for row in shown]
    return markdown_table(['epoch', *columns], cells)


def _compared(scales: Scales, started: Scales | None) -> str:
    first = {(row['stage'], row['branch']): f'{row["mean"]:.4f}' for row in scales_table(started or {})}
    cells = []
    for row in scales_table(scales):
        place = (row['stage'], row['branch'])
        found = (f'{row[name]:.4f}' for name in ('mean', 'min', 'max'))
        cells.append([*place, first.get(place, 'unknown'), *found])
    return markdown_table(['stage', 'branch', 'mean at the start of a search', 'mean', 'min', 'max'], cells)


def _classes(folder: Path, found: Tensor, names: Sequence[str]) -> list[str]:
    """Writes the confusion matrix of the last validation, and returns the section of the classes."""
    try:
        # Here, as it imports much that a training does not need.
        from ..deploy.evaluation import class_table, worst_classes, write_confusion

        labels, predictions = found
        write_confusion(labels, predictions, names, folder)
    except ImportError as error:
        _logger.warning(f'The report has no table of the classes: {error}')
        return []
    return [
        '## Classes',
        f'Of the last validation, the worst {_MOST_CLASSES} at most; all are in `classes.csv` and `confusion.csv`.',
        worst_classes(class_table(labels, predictions, names), _MOST_CLASSES),
        "![Confusion matrix: share of each class's images](confusion.png)",
    ]


def _next(folder: Path, args: argparse.Namespace, search: bool) -> list[str]:
    """Returns the commands that go on from here, with the settings of this run."""
    if search:
        scales, target = folder / SCALES_FILE, ModelName.parse(args.model).of_kind('target')
        train = ['train', '-c', folder / ARGUMENTS_FILE, '--model', target, '--opt', 'repopt_sgd', '--scales', scales]
        commands = [[*train, '--experiment', f'{args.experiment}-target'], ['scales', 'show', scales]]
    else:
        checkpoint = checkpoint_of(folder)
        commands = [['predict', 'IMAGE', '--model', checkpoint], ['push', checkpoint, 'USER/REPO']]
        if (images := image_folder(args)) is not None:
            data = ['--data', images, *(['--class-map', args.class_map] if args.class_map else [])]
            quantize = ['quantize', checkpoint, *data, '--split', args.train_split, '--out', folder / 'int8.onnx']
            commands.insert(1, quantize)
            # Another split would be other images than the share that was held out.
            if not args.holdout:
                commands.insert(0, ['evaluate', checkpoint, *data, '--split', args.val_split])
    return [shlex.join([PROGRAM, *map(str, words)]) for words in commands]


def _shell(*lines: str) -> str:
    return '\n'.join(['```bash', *lines, '```'])
