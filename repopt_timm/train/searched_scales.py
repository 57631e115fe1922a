"""What a search ends with, and what a training says of the scales that it starts from."""

import argparse
import logging
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import nn

from ..scales import Scales
from ..scales.summary import WORTH, movement
from .run_checkpoints import versions
from .run_folder import SCALES_FILE

__all__ = ['note_movement', 'save_searched']

_logger = logging.getLogger(__name__)


def save_searched(
    model: nn.Module, started: Scales, folder: Path, args: argparse.Namespace, history: Sequence[dict[str, Any]]
) -> None:
    """Writes the scales of a search with their provenance, and says how far they moved.

    Args:
        model: What was searched with.
        started: The scales that the search started from.
        folder: Folder of the run.
        args: Its arguments.
        history: A row for each epoch.
    """
    last = history[-1]
    provenance = {
        'method': 'hyper-search',
        'dataset': args.dataset or Path(args.data_dir).name,
        'epochs': len(history),
        'top1': round(last['eval_top1'], 3),
        'top5': round(last['eval_top5'], 3),
        'seed': args.seed,
        'input_size': list(args.input_size),
        'batch_size': args.batch_size * args.world_size * args.grad_accum_steps,
        'lr': args.lr,
        'weight_decay': args.weight_decay,
        'optimizer': args.opt,
        'versions': versions(),
        'date': f'{datetime.now(timezone.utc):%Y-%m-%d}',
    }
    provenance |= {name: getattr(args, name) for name in ('clip_grad', 'train_images') if getattr(args, name)}
    scales = Scales.from_model(model, provenance)
    scales.save(folder / SCALES_FILE)
    _logger.info(f'Scales {scales.fingerprint[:12]} are in {folder / SCALES_FILE}')
    _logger.info(movement([scales], started).sentence())


def note_movement(model: nn.Module) -> None:
    """Says if the scales that a plain network carries are close to the initial values."""
    try:
        moved = movement([Scales.from_model(model)], Scales.initial(model))
    except ValueError:
        # A twin, or a network whose prior is not known here.
        return
    if moved.hardly:
        _logger.info(
            f'These scales are close to the values that a search starts from: {moved}. Expect what --scales initial '
            f'gives ({WORTH}).'
        )
