"""What a run has left in its folder: whole, finite, and of one piece."""

import argparse
import csv
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from ..checkpoint_model import model_from_checkpoint
from ..checkpoints.read import read_checkpoint
from ..files import find_temporaries
from ..names import ModelName
from ..scales import read_scale_file
from ..train.engine import ranked
from ..train.parsing import write_config
from ..train.run_folder import ARGUMENTS_FILE, BEST_CHECKPOINT, LAST_CHECKPOINT, SCALES_FILE, SUMMARY_FILE, is_busy

__all__ = ['Finding', 'check_run']

# Arguments in a checkpoint that depend on how the run was continued.
_CONTINUED = {'epochs', 'cooldown_epochs'}


class Finding(NamedTuple):
    """Something that was looked at: `ok`, `failed`, or a `note` on what could not be."""

    what: str
    status: str
    detail: str


def check_run(folder: str | os.PathLike) -> list[Finding]:
    """Looks through the folder of a run, or of a search and the training after it.

    Checkpoints are read whole, which compares their parts with their checksums.

    Args:
        folder: Folder that holds `last.pth.tar`, or `search` and `target`.

    Raises:
        FileNotFoundError: If there is no run in it.
    """
    folder = Path(folder)
    parts = [folder] if (folder / LAST_CHECKPOINT).is_file() else []
    parts = parts or [path.parent for path in sorted(folder.glob(f'*/{LAST_CHECKPOINT}'))]
    if not parts:
        raise FileNotFoundError(
            f"There is no run in '{folder}', expected a folder with {LAST_CHECKPOINT}. Name the folder of a run, such "
            f'as output/RUN.'
        )
    findings = []
    for part in parts:
        prefix = '' if part == folder else f'{part.name}: '
        findings += [Finding(prefix + each.what, each.status, each.detail) for each in _check(part)]
    return findings


def _check(folder: Path) -> Iterator[Finding]:
    busy = is_busy(folder)
    if busy:
        yield Finding('process', 'note', 'another process trains in the folder, so what it writes now may differ')
    names = ', '.join(path.name for path in find_temporaries(folder))
    left = f'{names}: left by a process that was killed; --resume removes them'
    yield _finding('temporary files', left * bool(names and not busy))
    contents: dict[str, Any] = {}
    for path in _checkpoints(folder):
        # The best is a second name of another.
        same = next((name for name in contents if path.samefile(folder / name)), None)
        if same is None:
            problem, contents[path.name] = _read(path)
            yield _finding(path.name, problem, 'whole and finite')
        else:
            contents[path.name] = contents[same]
    last = contents[LAST_CHECKPOINT]
    if last is None:
        return
    for what, compare in _COMPARISONS.items():
        yield compare(what, folder, contents)


def _finding(what: str, problem: str, fine: str = 'none') -> Finding:
    return Finding(what, 'failed' if problem else 'ok', problem or fine)


def _checkpoints(folder: Path) -> list[Path]:
    paths = [folder / LAST_CHECKPOINT, folder / BEST_CHECKPOINT, *sorted(folder.glob('checkpoint-*.pth.tar'))]
    return [path for path in paths if path.is_file()]


def _read(path: Path) -> tuple[str, dict[str, Any] | None]:
    try:
        content = read_checkpoint(path)
    except ValueError as error:
        return str(error), None
    history = content.get('history') or []
    if [row.get('epoch') for row in history] != list(range(len(history))) or not history:
        return 'its history does not count the epochs', None
    if content.get('epoch') != len(history) - 1:
        return f'it is of epoch {content.get("epoch")}, and its history has {len(history)} rows', None
    bad = next(iter(_not_finite(content)), '')
    return f"'{bad}' is not finite" * bool(bad), content


def _not_finite(value: Any, where: str = '') -> Iterator[str]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and not value.isfinite().all():
            yield where
    elif isinstance(value, float) and not math.isfinite(value):
        yield where
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f'{where}.{key}'.lstrip('.'))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _not_finite(item, f'{where}[{index}]')


def _summary(what: str, folder: Path, contents: dict[str, Any]) -> Finding:
    path = folder / SUMMARY_FILE
    if not path.is_file():
        return _finding(what, f'{SUMMARY_FILE} is missing')
    history = contents[LAST_CHECKPOINT]['history']
    with open(path, encoding='utf-8', newline='') as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    expected = [{name: str(value + 1 if name == 'epoch' else value) for name, value in row.items()} for row in history]
    differ = next((index for index, pair in enumerate(zip(rows, expected)) if pair[0] != pair[1]), None)
    problem = ''
    if len(rows) != len(expected):
        problem = f'{SUMMARY_FILE} has {len(rows)} epochs and {LAST_CHECKPOINT} {len(expected)}'
    elif differ is not None:
        problem = f'epoch {differ + 1} in {SUMMARY_FILE} is not that of {LAST_CHECKPOINT}'
    return _finding(what, problem, f'{len(history)} epochs, the same in {SUMMARY_FILE}')


def _best(what: str, folder: Path, contents: dict[str, Any]) -> Finding:
    # A run that went back, or on in another folder, lacks the checkpoints of some epochs.
    there = {content['epoch'] for content in contents.values() if content is not None}
    rows = [row for row in ranked(contents[LAST_CHECKPOINT]['history']) if row['epoch'] in there]
    best = contents.get(BEST_CHECKPOINT)
    if not rows or best is None:
        return Finding(what, 'note', f'there is no {BEST_CHECKPOINT} to compare' if rows else 'no epoch was evaluated')
    wanted, top1 = rows[0]['epoch'], rows[0]['eval_top1']
    problem = f'{BEST_CHECKPOINT} is of epoch {best["epoch"] + 1}, and epoch {wanted + 1} was better'
    return _finding(what, problem * (best['epoch'] != wanted), f'epoch {wanted + 1}, top-1 {top1:.2f} %')


def _arguments(what: str, folder: Path, contents: dict[str, Any]) -> Finding:
    path, args = folder / ARGUMENTS_FILE, contents[LAST_CHECKPOINT].get('args')
    if not path.is_file() or not isinstance(args, argparse.Namespace):
        return _finding(what, f'{ARGUMENTS_FILE} or the arguments in {LAST_CHECKPOINT} are missing')
    try:
        written, saved = (yaml.safe_load(text) for text in (path.read_text(encoding='utf-8'), write_config(args)))
        differ = [name for name in saved if name not in _CONTINUED and written.get(name) != saved[name]]
    except (yaml.YAMLError, AttributeError) as error:
        return _finding(what, f'{ARGUMENTS_FILE} cannot be compared: {" ".join(str(error).split())}')
    problem = f'{ARGUMENTS_FILE} and {LAST_CHECKPOINT} differ in {", ".join(differ)}' * bool(differ)
    return _finding(what, problem, f'the same in {ARGUMENTS_FILE} and {LAST_CHECKPOINT}')


def _scales(what: str, folder: Path, contents: dict[str, Any]) -> Finding:
    checkpoint, path = contents[LAST_CHECKPOINT], folder / LAST_CHECKPOINT
    name = ModelName.parse(checkpoint['arch'])
    if name.kind == 'hs':
        if not (folder / SCALES_FILE).is_file():
            return Finding(what, 'note', f'no {SCALES_FILE}, which the last epoch writes')
        same = read_scale_file(folder / SCALES_FILE) == read_scale_file(path)
        return _finding(
            what, f'those in {SCALES_FILE} and {LAST_CHECKPOINT} differ' * (not same), f'as in {SCALES_FILE}'
        )
    if hasattr(checkpoint.get('args'), 'quantization'):
        return Finding(what, 'note', 'of a fake-quantized training, whose checkpoints do not have them')
    fingerprint = checkpoint.get('scales_fingerprint')
    groups = {group.get('scales_fingerprint') for group in checkpoint['optimizer']['param_groups']} - {None}
    if groups - {fingerprint}:
        return _finding(what, f'the optimizer has {", ".join(sorted(groups))}, the checkpoint {fingerprint}')
    if fingerprint is None or name.kind == 'csla':
        return Finding(what, 'ok', 'in the checkpoint itself' if fingerprint else 'none')
    try:
        model_from_checkpoint(path)
    except (OSError, ValueError) as error:
        return Finding(what, 'note', f'{fingerprint[:12]}, but not found again: {error}')
    source = getattr(checkpoint['args'], 'scales', None) or getattr(checkpoint['args'], 'model', None)
    return Finding(what, 'ok', f'{fingerprint[:12]}, as in {source}')


_COMPARISONS: dict[str, Callable[[str, Path, dict[str, Any]], Finding]] = {
    'history': _summary,
    'best epoch': _best,
    'arguments': _arguments,
    'scales': _scales,
}
