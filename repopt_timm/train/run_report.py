"""`report.md` in the folder of a finished run: what it was, what came out, and what to do with it."""

import argparse
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..commands import PROGRAM
from ..files import write_text
from ..models.initial_values import initial_values
from ..names import ModelName
from ..plot import plot_curves, plot_scales
from ..reparam import kind_of
from ..reporting import markdown_table
from ..scales import Scales, scales_table
from .engine import ranked
from .loaders import image_folder
from .run_checkpoints import versions
from .run_folder import ARGUMENTS_FILE, BEST_CHECKPOINT, LAST_CHECKPOINT, SCALES_FILE

__all__ = ['write_report']

_logger = logging.getLogger(__name__)

_REPORT_FILE = 'report.md'
_MOST_EPOCHS = 20


def write_report(
    folder: Path, model: nn.Module, args: argparse.Namespace, history: Sequence[dict[str, Any]], seconds: float
) -> None:
    """Writes `report.md` and its pictures.

    Args:
        folder: Folder of the run.
        model: What was trained.
        args: Arguments of the run.
        history: A row for each epoch.
        seconds: Time that the last call of the run took.
    """
    scales, started = _scales_of(model)
    drawn = _draw(folder, args.model, history, scales, started)
    best = ''.join(f', at best {row["eval_top1"]:.2f} % after epoch {row["epoch"] + 1}' for row in ranked(history)[:1])
    # `train` does not repeat a run of `qat`, and the other commands take no quantized network.
    quantized = hasattr(args, 'quantization')
    again = f'{PROGRAM} train -c {shlex.quote(str(folder / ARGUMENTS_FILE))} --experiment again'
    sections = [
        f'# {folder.name}',
        f'`{args.model}` with `{args.opt}` on {args.dataset or Path(args.data_dir).name}: top-1 '
        f'{history[-1]["eval_top1"]:.2f} % after {len(history)} epochs{best}; the last call took {seconds:.0f} s.',
        *([] if quantized else ['## Command', _shell(again)]),
        f'`{ARGUMENTS_FILE}` holds all arguments{" of the training" * quantized}. Versions: '
        f'{", ".join(f"{k} {v}" for k, v in versions().items())}.',
        '## Curves',
        *(['![Training loss and accuracy against epochs](curves.png)'] if drawn else []),
        _rows(history),
    ]
    if scales is not None:
        sections += ['## Scales', f'Fingerprint `{scales.fingerprint}`.', _compared(scales, started)]
        sections += ['![Scales against depth, and what they start from](scales.png)'] if drawn else []
    sections += ['## Next', _shell(*_next(folder, args, 'quantized' if quantized else kind_of(model)))]
    write_text(folder / _REPORT_FILE, '\n\n'.join(sections) + '\n')
    _logger.info(f'Report: {folder / _REPORT_FILE}')


def _scales_of(model: nn.Module) -> tuple[Scales | None, Scales | None]:
    try:
        scales = Scales.from_model(model)
    except ValueError:
        return None, None
    try:
        return scales, initial_values(scales)
    except ValueError:
        # Of a network with arguments of its own.
        return scales, None


def _draw(
    folder: Path, name: str, history: Sequence[dict[str, Any]], scales: Scales | None, started: Scales | None
) -> bool:
    try:
        plot_curves({name: history}, folder / 'curves.png')
        # That of a search is there already.
        if scales is not None and not (folder / 'scales.png').is_file():
            plot_scales(scales, folder / 'scales.png', scales.title, started)
    except ImportError as error:
        _logger.warning(f'The report has no pictures: {error}')
        return False
    return True


def _rows(history: Sequence[dict[str, Any]]) -> str:
    columns = [
        name for name in ('epoch', 'lr', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5') if name in history[-1]
    ]
    step = -(-len(history) // _MOST_EPOCHS)
    # The last one, and as many before it as a reader looks at.
    shown = list(history)[::-step][::-1]
    cells = [
        [str(row['epoch'] + 1), *(f'{row[name]:.4g}' if name in row else '' for name in columns[1:])] for row in shown
    ]
    return markdown_table(columns, cells)


def _compared(scales: Scales, started: Scales | None) -> str:
    first = {(row['stage'], row['branch']): row['mean'] for row in scales_table(started)} if started else {}
    cells = []
    for row in scales_table(scales):
        before = first.get((row['stage'], row['branch']))
        numbers = [f'{row[name]:.4f}' for name in ('mean', 'min', 'max')]
        cells.append([row['stage'], row['branch'], 'unknown' if before is None else f'{before:.4f}', *numbers])
    return markdown_table(['stage', 'branch', 'mean at the start of a search', 'mean', 'min', 'max'], cells)


def _next(folder: Path, args: argparse.Namespace, kind: str) -> list[str]:
    best = folder / BEST_CHECKPOINT
    checkpoint = shlex.quote(str(best if best.exists() else folder / LAST_CHECKPOINT))
    check = f'{PROGRAM} doctor {shlex.quote(str(folder))}'
    if kind == 'quantized':
        return [check]
    if kind == 'hs':
        target = ModelName.parse(args.model).of_kind('target')
        scales = shlex.quote(str(folder / SCALES_FILE))
        given = {'--dataset': args.dataset, '--data-dir': args.data_dir}
        where = ' '.join(f'{flag} {shlex.quote(value)}' for flag, value in given.items() if value)
        return [f'{PROGRAM} train {where} --model {target} --scales {scales}', f'{PROGRAM} scales show {scales}', check]
    lines = [f'{PROGRAM} predict IMAGE --model {checkpoint}', f'{PROGRAM} push {checkpoint} USER/REPO', check]
    if (images := image_folder(args)) is not None:
        out = shlex.quote(str(folder / 'int8.onnx'))
        split = '' if args.train_split == 'train' else f' --split {shlex.quote(args.train_split)}'
        lines.insert(1, f'{PROGRAM} quantize {checkpoint} --data {shlex.quote(images)}{split} --out {out}')
    return lines


def _shell(*lines: str) -> str:
    return '\n'.join(['```bash', *lines, '```'])
