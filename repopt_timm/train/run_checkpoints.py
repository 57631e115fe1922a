"""Checkpoints of a run, one per epoch, in the format of timm's training script."""

import argparse
import csv
import io
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.utils import get_state_dict, unwrap_model
from torch import nn

from ..checkpoints.read import read_checkpoint
from ..files import replacing, write_text
from ..reparam import carried_scales, kind_of
from ..reporting import package_versions
from ..scales import Scales
from ..scales.files import CHECKPOINT_KEY, checkpoint_entry
from ..sources import IMPLIED
from ..trained_scales import IMPLIED_KEY
from ..weights_origin import origin_of
from .engine import TrainState, ranked
from .run_folder import BEST_CHECKPOINT, LAST_CHECKPOINT, SUMMARY_FILE
from .schema import ARGUMENTS

__all__ = [
    'CheckpointSaver',
    'changed_arguments',
    'find_checkpoint',
    'load_weights',
    'restore',
    'scales_fingerprint',
    'versions',
]

_logger = logging.getLogger(__name__)

# Options in parameter groups that schedules add, or other versions of torch do not have.
_NOT_OF_ALL_VERSIONS = {
    'initial_lr',
    'lr_scale',
    'foreach',
    'maximize',
    'capturable',
    'differentiable',
    'fused',
    'decoupled_weight_decay',
}


class CheckpointSaver:
    """Writes `last.pth.tar` after each epoch, and keeps the best under `checkpoint-<epoch>` and `model_best`.

    Files appear whole or not at all, and the history of the run is inside, so that it goes on after any interruption.
    timm's own script can resume from them, and its loaders read them. The numbers of epochs in names and in the
    checkpoints are timm's, from 0; those of `summary.csv` are from 1, as in the log.

    Args:
        folder: Where to.
        args: Arguments of the run, stored along.
        max_history: Number of best checkpoints to keep.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, max_history: int):
        self.folder = folder
        self.args = args
        self.max_history = max_history

    def save(self, state: TrainState) -> None:
        """Saves the state after its last epoch.

        Raises:
            OSError: If there is no room for it, or it cannot be written; the checkpoints before it are kept.
        """
        kept = self._kept(state.history)
        epoch = state.history[-1]['epoch']
        with replacing(self.folder / LAST_CHECKPOINT) as temporary:
            _write(_content(state, self.args), temporary, self.folder / LAST_CHECKPOINT)
            # What a kill leaves between here and the renaming is right too: the resumed run comes by again.
            if epoch in kept:
                _duplicate(temporary, self._path(epoch))
            if kept[:1] == [epoch]:
                _duplicate(temporary, self.folder / BEST_CHECKPOINT)
            self._write_summary(state.history)
        self._remove_others(kept)

    def rebuild(self, history: list[dict[str, Any]], source: Path) -> None:
        """Makes the folder what the history of the checkpoint that a run is resumed from says.

        Args:
            history: Its history.
            source: Its file.
        """
        kept = self._kept(history)
        epoch = history[-1]['epoch']
        _duplicate(source, self.folder / LAST_CHECKPOINT)
        if epoch in kept:
            _duplicate(source, self._path(epoch))
        best = self.folder / BEST_CHECKPOINT
        if kept:
            _duplicate(self._path(kept[0]), best)
        else:
            best.unlink(missing_ok=True)
        self._write_summary(history)
        self._remove_others(kept)

    def _kept(self, history: list[dict[str, Any]]) -> list[int]:
        """Returns the epochs of the best checkpoints, the best first: of those in the folder, and of the last epoch."""
        epochs = [row['epoch'] for row in ranked(history)]
        last = history[-1]['epoch']
        return [epoch for epoch in epochs if epoch == last or self._path(epoch).exists()][: self.max_history]

    def _write_summary(self, history: list[dict[str, Any]]) -> None:
        columns = list(dict.fromkeys(name for row in history for name in row))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, columns, lineterminator='\n')
        writer.writeheader()
        writer.writerows({**row, 'epoch': row['epoch'] + 1} for row in history)
        write_text(self.folder / SUMMARY_FILE, buffer.getvalue())

    def _remove_others(self, kept: Iterable[int]) -> None:
        paths = {self._path(epoch) for epoch in kept}
        for path in self.folder.glob('checkpoint-*.pth.tar'):
            if path not in paths:
                path.unlink(missing_ok=True)

    def _path(self, epoch: int) -> Path:
        return self.folder / f'checkpoint-{epoch}.pth.tar'


class _RecordingFile:
    """Keeps the error of a failed write, which torch replaces by one of its own."""

    def __init__(self, file: Any):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write(content: dict[str, Any], temporary: Path, path: Path) -> None:
    cause: Exception | None = None
    recorder = None
    try:
        with open(temporary, 'wb') as file:
            recorder = _RecordingFile(file)
            torch.save(content, recorder)  # type: ignore[arg-type]
    except (OSError, RuntimeError) as error:
        cause = (recorder.error if recorder else None) or error
    if cause is not None:
        reason = (cause.strerror if isinstance(cause, OSError) else None) or ' '.join(str(cause).split())
        kept = 'The checkpoint of the epoch before it is still there. ' if path.exists() else ''
        raise OSError(f"Cannot write '{path}': {reason}. {kept}Make room and continue with --resume.")


def _read(path: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    history: Any = checkpoint.get('history')
    if not isinstance(history, list) or not history or [_epoch_of(row) for row in history] != list(range(len(history))):
        raise ValueError(
            f"'{path}' is not the checkpoint of a run: it has no history of its epochs. Start from its weights with "
            f'--initial-checkpoint.'
        )
    return checkpoint


def _epoch_of(row: Any) -> Any:
    return row.get('epoch') if isinstance(row, dict) else None


def find_checkpoint(folder: Path, resume: str, override: bool) -> tuple[Path, dict[str, Any]] | None:
    """Reads the checkpoint that a run goes on from.

    Args:
        folder: Folder of the run.
        resume: A file in it, or `auto` for its last that is not damaged.
        override: Go back to a checkpoint before the last.

    Returns:
        Its path and content; None if the run has none.

    Raises:
        ValueError: If it is damaged, or the run went on after it.
    """
    if resume != 'auto':
        path = Path(resume)
        checkpoint = _read(path)
        if not override:
            _check_newest(folder, path, checkpoint)
        return path, checkpoint
    last = folder / LAST_CHECKPOINT
    others = sorted(folder.glob('checkpoint-*.pth.tar'), key=_number, reverse=True)
    complaint = ''
    for path in (last, *others, folder / BEST_CHECKPOINT):
        if not path.exists():
            continue
        try:
            checkpoint = _read(path)
        except ValueError as error:
            complaint = complaint or str(error)
            continue
        if complaint:
            _logger.warning(f"{complaint} Going on from '{path}', which is of epoch {len(checkpoint['history'])}.")
        return path, checkpoint
    if complaint:
        raise ValueError(f'{complaint} No other checkpoint in the folder can be read: start again in another folder.')
    return None


def _number(path: Path) -> int:
    number = path.name.removeprefix('checkpoint-').removesuffix('.pth.tar')
    return int(number) if number.isdecimal() else -1


def _check_newest(folder: Path, path: Path, checkpoint: dict[str, Any]) -> None:
    last = folder / LAST_CHECKPOINT
    if not last.exists() or last.samefile(path):
        return
    try:
        newest = len(_read(last)['history'])
    except ValueError:
        return
    done = len(checkpoint['history'])
    if newest > done:
        raise ValueError(
            f"'{path}' is of epoch {done}, and the run in '{folder}' went on to epoch {newest}. Continue it with "
            f"--resume '{last}', go back and lose these epochs with --override, or copy '{path.name}' "
            f'into another folder.'
        )


def changed_arguments(saved: Any, args: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """Compares the arguments of a checkpoint with those of a run that shall go on from it.

    Args:
        saved: Arguments in the checkpoint.
        args: Arguments of the run, defaults resolved.

    Returns:
        Old and new values of the arguments that change the training, by name.
    """
    names = [argument.name for argument in ARGUMENTS.values() if not argument.free] + ['world_size', 'quantization']
    changed = {}
    for name in names:
        if not hasattr(saved, name):
            # An older version wrote it, or a run of another kind.
            continue
        old, new = getattr(saved, name), getattr(args, name, None)
        if _comparable(name, old) != _comparable(name, new):
            changed[name] = (old, new)
    return changed


def _comparable(name: str, value: Any) -> Any:
    if name == 'data_dir' and value:
        return os.path.abspath(value)
    if isinstance(value, list | tuple):
        return [_comparable('', item) for item in value]
    if isinstance(value, dict):
        return {key: _comparable('', item) for key, item in value.items() if item is not None}
    return value


def _content(state: TrainState, args: argparse.Namespace) -> dict[str, Any]:
    model: Any = unwrap_model(state.model)
    content = {
        'epoch': state.history[-1]['epoch'],
        # Not --model, which may name a tag or a repository.
        'arch': model.pretrained_cfg['architecture'],
        'state_dict': get_state_dict(state.model, unwrap_model),
        'optimizer': state.optimizer.state_dict(),
        'version': 2,
        'args': args,
        'label_names': model.pretrained_cfg.get('label_names'),
        'origin': origin_of(model),
        'versions': versions(),
        'scales_fingerprint': scales_fingerprint(model),
        'metric': state.history[-1].get('eval_top1'),
        'history': state.history,
    }
    if kind_of(model) != 'target':
        content[CHECKPOINT_KEY] = checkpoint_entry(Scales.from_model(model))
    elif IMPLIED in (args.scales, (args.model_kwargs or {}).get('scales')):
        # No name leads to them once the branches are merged.
        scales = Scales.from_model(model)
        modules = {name: dict(vectors) for name, vectors in scales.items()}
        content[IMPLIED_KEY] = {'modules': modules, 'counts': scales.counts, 'provenance': scales.provenance}
    if state.ema is not None:
        content['state_dict_ema'] = get_state_dict(state.ema, unwrap_model)
    if state.scaler is not None:
        content['amp_scaler'] = state.scaler.state_dict()
    return content


def scales_fingerprint(model: Any) -> str | None:
    """Returns the fingerprint of the scales that a model trains with; None without, and for a search."""
    kind = kind_of(model)
    if kind == 'hs' or (kind == 'target' and not carried_scales(model)):
        return None
    return Scales.from_model(model).fingerprint


def versions() -> dict[str, str]:
    """Returns the versions of the packages that a training depends on."""
    return package_versions(torch, torchvision, timm)


def restore(state: TrainState, checkpoint: dict[str, Any], source: str, override: bool = False) -> None:
    """Brings a state to where a checkpoint was written.

    Args:
        state: State of a run with the same arguments.
        checkpoint: What `CheckpointSaver` wrote.
        source: Name of the file, for the error.
        override: Keep the hyperparameters of the state's optimizer instead of those in the checkpoint.

    Raises:
        ValueError: If the checkpoint lacks something that the run needs to go on, or has other scales.
    """
    needed = {'state_dict', 'optimizer', 'history'}
    needed |= {'state_dict_ema'} if state.ema is not None else set()
    needed |= {'amp_scaler'} if state.scaler is not None else set()
    missing = sorted(needed - set(checkpoint))
    if missing:
        raise ValueError(
            f"'{source}' has no {', '.join(missing)}, so the run cannot go on from it as if uninterrupted. Resume "
            f'with the arguments of that run, or start a new one with --initial-checkpoint.'
        )
    load_weights(unwrap_model(state.model), checkpoint['state_dict'], source)
    _restore_optimizer(state.optimizer, checkpoint['optimizer'], source, override)
    if state.ema is not None:
        load_weights(unwrap_model(state.ema), checkpoint['state_dict_ema'], source)
    if state.scaler is not None:
        state.scaler.load_state_dict(checkpoint['amp_scaler'])
    state.history = checkpoint['history']


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], source: str, override: bool) -> None:
    wanted = [{name: value for name, value in group.items() if name != 'params'} for group in optimizer.param_groups]
    found = set().union(*saved.get('param_groups', []))
    expected = set().union(*wanted) - _NOT_OF_ALL_VERSIONS
    missing = sorted(expected - found)
    if missing:
        raise ValueError(
            f"'{source}' has the state of another optimizer, without {', '.join(missing)}, so that "
            f'{type(optimizer).__name__} cannot go on from it. Resume with the --opt of that run, or start a new one '
            f'with --initial-checkpoint.'
        )
    try:
        optimizer.load_state_dict(saved)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"'{source}' has the state of another optimizer: {error}. Resume with the arguments of that run, or start "
            f'a new one with --initial-checkpoint.'
        ) from None
    if override:
        for group, values in zip(optimizer.param_groups, wanted):
            group.update(values)


def load_weights(model: nn.Module, state_dict: dict[str, Any], source: str) -> None:
    """Loads weights.

    Raises:
        ValueError: If they are not those of the model; names the file.
    """
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(f"'{source}' does not hold the weights of this model: {error}") from None


def _duplicate(source: Path, target: Path) -> None:
    if target.exists() and target.samefile(source):
        return
    with replacing(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
