"""Checkpoints of a run, one per epoch, in the format of timm's training script."""

import argparse
import io
import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.utils import get_state_dict, unwrap_model
from timm.utils.misc import natural_key

from ..checkpoints.read import read_checkpoint
from ..errors import explaining, reason_of
from ..files import replacing
from ..reparam import carried_scales, kind_of
from ..reporting import package_versions
from ..scales import Scales
from ..scales.files import CHECKPOINT_KEY, checkpoint_entry
from ..sources import IMPLIED
from ..trained_scales import IMPLIED_KEY
from ..weights_origin import origin_of
from .engine import TrainState, ranked
from .parsing import ARGUMENTS
from .run_folder import BEST_CHECKPOINT, LAST_CHECKPOINT, SUMMARY_FILE, TIMES_FILE, write_epochs

__all__ = ['CheckpointSaver', 'changed_arguments', 'find_checkpoint', 'restore', 'scales_fingerprint', 'versions']

_logger = logging.getLogger(__name__)

# Arguments that do not change what is trained.
_FREE = {
    *('val_split', 'val_num_samples', 'cache_images', 'dataset_download', 'scales', 'pretrained', 'initial_checkpoint'),
    *('resume', 'override', 'crop_pct', 'interpolation', 'validation_batch_size', 'channels_last'),
    *('grad_checkpointing', 'torchcompile', 'device', 'epochs', 'cooldown_epochs', 'patience', 'log_interval'),
    *('val_interval', 'checkpoint_hist', 'workers', 'pin_mem', 'output', 'experiment', 'log_tensorboard', 'log_wandb'),
    *('debug', 'search_first'),
}

# Options in parameter groups that schedules add, or other versions of torch do not have.
_NOT_OF_ALL_VERSIONS = {
    *('initial_lr', 'lr_scale', 'foreach', 'maximize', 'capturable', 'differentiable', 'fused'),
    'decoupled_weight_decay',
}


class CheckpointSaver:
    """Writes `last.pth.tar` after each epoch, and keeps the best under `checkpoint-<epoch>` and `model_best`.

    Files appear whole or not at all, and the history of the run is inside, so that it goes on after any interruption.
    timm's own script can resume from them, and its loaders read them. The numbers of epochs in names and in the
    checkpoints are timm's, from 0; those of `summary.csv` and `times.csv` are from 1, as in the log.

    Args:
        folder: Where to.
        args: Arguments of the run, stored along; `checkpoint_hist` is the number of best checkpoints to keep.
    """

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder = folder
        self.args = args

    def save(self, state: TrainState) -> None:
        """Saves the state after its last epoch.

        Raises:
            OSError: If there is no room for it, or it cannot be written; the checkpoints before it are kept.
        """
        # A file that torch writes itself loses the cause of an error.
        buffer = io.BytesIO()
        torch.save(_content(state, self.args), buffer)
        with replacing(self.folder / LAST_CHECKPOINT) as temporary:
            temporary.write_bytes(buffer.getbuffer())
            # If the process is killed before the renaming, the resumed run repeats this epoch and these files.
            self._write_others(temporary, state)

    def rebuild(self, state: TrainState, source: Path) -> None:
        """Makes the folder what the history of the checkpoint that a run is resumed from says.

        Args:
            state: The resumed state.
            source: File of the checkpoint.
        """
        _duplicate(source, self.folder / LAST_CHECKPOINT)
        self._write_others(source, state)

    def _write_others(self, last: Path, state: TrainState) -> None:
        newest = self._path(state.history[-1])
        # The best first.
        there = [path for path in map(self._path, ranked(state.history)) if path == newest or path.exists()]
        kept = there[: self.args.checkpoint_hist]
        if newest in kept:
            _duplicate(last, newest)
        if kept:
            _duplicate(kept[0], self.folder / BEST_CHECKPOINT)
        else:
            (self.folder / BEST_CHECKPOINT).unlink(missing_ok=True)
        write_epochs(self.folder / SUMMARY_FILE, state.history)
        write_epochs(self.folder / TIMES_FILE, state.times)
        for path in set(self.folder.glob('checkpoint-*.pth.tar')).difference(kept):
            path.unlink(missing_ok=True)

    def _path(self, row: dict[str, Any]) -> Path:
        return self.folder / f'checkpoint-{row["epoch"]}.pth.tar'


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
        checkpoint = _read(Path(resume))
        done = len(checkpoint['history'])
        newest = done
        with suppress(FileNotFoundError, ValueError):
            newest = len(_read(folder / LAST_CHECKPOINT)['history'])
        if newest > done and not override:
            raise ValueError(
                f"'{resume}' is of epoch {done}, and the run in '{folder}' went on to epoch {newest}. Continue it with "
                f"--resume '{folder / LAST_CHECKPOINT}', go back and lose these epochs with --override, or copy the "
                f'file into another folder.'
            )
        return Path(resume), checkpoint
    others = sorted(folder.glob('checkpoint-*.pth.tar'), key=lambda path: natural_key(path.name), reverse=True)
    complaint = ''
    for path in (folder / LAST_CHECKPOINT, *others, folder / BEST_CHECKPOINT):
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


def _read(path: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    history: Any = checkpoint.get('history')
    with explaining(f"'{path}' is not the checkpoint of a run; start from its weights with --initial-checkpoint"):
        if not history or [row['epoch'] for row in history] != list(range(len(history))):
            raise TypeError('it has no history of its epochs')
    return checkpoint


def changed_arguments(saved: Any, args: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """Compares the arguments of a checkpoint with those of a run that shall go on from it.

    Args:
        saved: Arguments in the checkpoint.
        args: Arguments of the run, defaults resolved.

    Returns:
        Old and new values of the arguments that change the training, by name.
    """
    changed = {}
    for name in [*(name for name in ARGUMENTS if name not in _FREE), 'world_size']:
        # One that is not there is of an older version.
        old, new = getattr(saved, name, '' if name == 'init' else None), getattr(args, name, None)
        if (hasattr(saved, name) or name == 'init') and _comparable(name, old) != _comparable(name, new):
            changed[name] = (old, new)
    return changed


def _comparable(name: str, value: Any) -> Any:
    if name == 'data_dir' and value:
        return os.path.abspath(value)
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item is not None}
    # A tuple is a list in the args.yaml of the run.
    return json.loads(json.dumps(value, default=str))


def _content(state: TrainState, args: argparse.Namespace) -> dict[str, Any]:
    model: Any = unwrap_model(state.model)
    content = {
        'epoch': state.history[-1]['epoch'],
        # Not --model, which may name a tag or a repository.
        'arch': model.pretrained_cfg['architecture'],
        'state_dict': get_state_dict(state.model, unwrap_model),
        'optimizer': state.optimizer.state_dict(),
        'version': 2,
        # Of argparse's own class, which loads without running code.
        'args': argparse.Namespace(**{**vars(args), 'overridden': state.overridden}),
        'label_names': model.pretrained_cfg.get('label_names'),
        'origin': origin_of(model),
        'versions': versions(),
        'scales_fingerprint': scales_fingerprint(model),
        'metric': state.history[-1].get('eval_top1'),
        'history': state.history,
        'times': state.times,
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
    scales = Scales.from_model(model)
    if kind == 'csla':
        # Its identities are trained.
        constant = {name: {b: vector for b, vector in scales[name].items() if b != 'identity'} for name in scales}
        scales = Scales(scales.architecture, constant, scales.geometry, start=scales.start)
    return scales.fingerprint


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
        ValueError: If the checkpoint lacks something that the run needs to go on, or is of another model or optimizer.
    """
    optimizer = state.optimizer
    wanted = [{name: value for name, value in group.items() if name != 'params'} for group in optimizer.param_groups]
    try:
        unwrap_model(state.model).load_state_dict(checkpoint['state_dict'])
        saved = checkpoint['optimizer']['param_groups']
        if lacking := set().union(*wanted) - set().union(*saved) - _NOT_OF_ALL_VERSIONS:
            raise KeyError(f'its optimizer has no {", ".join(sorted(lacking))}')
        optimizer.load_state_dict(checkpoint['optimizer'])
        if state.ema is not None:
            unwrap_model(state.ema).load_state_dict(checkpoint['state_dict_ema'])
        if state.scaler is not None:
            state.scaler.load_state_dict(checkpoint['amp_scaler'])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"'{source}' does not hold the state of this run ({reason_of(error)}): resume with the arguments of that "
            f'run, or start a new one with --initial-checkpoint.'
        ) from None
    if override:
        for group, values in zip(optimizer.param_groups, wanted):
            group.update(values)
    state.history, state.times = checkpoint['history'], checkpoint.get('times', [])


def _duplicate(source: Path, target: Path) -> None:
    if target.exists() and target.samefile(source):
        return
    with replacing(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
