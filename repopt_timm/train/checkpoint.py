"""Checkpoints of a run, one per epoch, in the format of timm's training script."""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.utils import get_state_dict, unwrap_model
from torch import nn

from ..files import replacing
from ..reparam import kind_of
from ..scales import Scales
from ..scales.scale_files import CHECKPOINT_KEY, checkpoint_entry
from .state import TrainState

__all__ = ['LAST_CHECKPOINT', 'CheckpointSaver', 'load_weights', 'restore', 'versions']

LAST_CHECKPOINT = 'last.pth.tar'


class CheckpointSaver:
    """Writes `last.pth.tar` after each epoch, and keeps the best under `checkpoint-<epoch>` and `model_best`.

    Files appear whole or not at all, and the history of the run is inside, so that it goes on after any interruption.
    timm's own script can resume from them, and its loaders read them.

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
        """Saves the state after its last epoch."""
        epoch = state.history[-1]['epoch']
        last = self.folder / LAST_CHECKPOINT
        with replacing(last) as temporary:
            torch.save(_content(state, self.args), temporary)
        ranked = sorted(
            (row for row in state.history if 'eval_top1' in row), key=lambda row: (-row['eval_top1'], row['epoch'])
        )
        kept = {row['epoch'] for row in ranked[: self.max_history]}
        if epoch in kept:
            _duplicate(last, self._path(epoch))
        if ranked and ranked[0]['epoch'] == epoch:
            _duplicate(last, self.folder / 'model_best.pth.tar')
        for row in state.history:
            if row['epoch'] not in kept:
                self._path(row['epoch']).unlink(missing_ok=True)

    def _path(self, epoch: int) -> Path:
        return self.folder / f'checkpoint-{epoch}.pth.tar'


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
        'versions': versions(),
        'metric': state.history[-1].get('eval_top1'),
        'history': state.history,
    }
    if kind_of(model) != 'target':
        content[CHECKPOINT_KEY] = checkpoint_entry(Scales.from_model(model))
    if state.ema is not None:
        content['state_dict_ema'] = get_state_dict(state.ema, unwrap_model)
    if state.scaler is not None:
        content['amp_scaler'] = state.scaler.state_dict()
    return content


def versions() -> dict[str, str]:
    """Returns the versions of the packages that a training depends on."""
    # As plain text, which torch.load restores without running code.
    return {package.__name__: str(package.__version__) for package in (torch, torchvision, timm)}


def restore(state: TrainState, checkpoint: dict[str, Any], source: str) -> None:
    """Brings a state to where a checkpoint was written.

    Args:
        state: State of a run with the same arguments.
        checkpoint: What `CheckpointSaver` wrote.
        source: Name of the file, for the error.

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
    state.optimizer.load_state_dict(checkpoint['optimizer'])
    if state.ema is not None:
        unwrap_model(state.ema).load_state_dict(checkpoint['state_dict_ema'])
    if state.scaler is not None:
        state.scaler.load_state_dict(checkpoint['amp_scaler'])
    state.history = checkpoint['history']


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
    with replacing(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
