"""The learning rate schedule of a run: how long it warms up, and where it is when a run is resumed."""

import argparse
import logging
from pathlib import Path

import timm
import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler

from .engine import TrainState
from .run_folder import saved_argument

__all__ = ['choose_warmup', 'make_schedule', 'replay_schedule']

_logger = logging.getLogger(__name__)


def choose_warmup(args: argparse.Namespace, folder: Path) -> None:
    """Sets `--warmup-epochs` of a run that was given none; one that is resumed keeps what it had.

    Args:
        args: Arguments of the run.
        folder: Folder of the run.
    """
    given = args.warmup_epochs
    if given is None:
        saved = saved_argument(folder, 'warmup_epochs', int) if args.resume else None
        args.warmup_epochs = min(5, args.epochs // 5) if saved is None else saved
    elif given >= args.epochs and args.sched != 'none' and args.rank == 0:
        _logger.warning(
            f'--warmup-epochs is {given} and --epochs {args.epochs}, so that the learning rate never reaches '
            f'{args.lr:g}: lower --warmup-epochs.'
        )


def make_schedule(
    optimizer: torch.optim.Optimizer, args: argparse.Namespace, updates: int
) -> tuple[Scheduler | None, int]:
    """Makes timm's schedule of a run's learning rate.

    Args:
        optimizer: Whose learning rate it sets.
        args: Arguments of the run.
        updates: Steps of an epoch.

    Returns:
        The schedule, None for `--sched none`, and the number of epochs with cool-down.

    Raises:
        ValueError: If the installed timm does not have the schedule.
    """
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates)
    if scheduler is None and args.sched != 'none':
        # timm would train with a constant learning rate, without warm-up.
        raise ValueError(f"timm {timm.__version__} has no schedule '{args.sched}': upgrade timm, or choose another.")
    return scheduler, epochs


def replay_schedule(state: TrainState, updates_per_epoch: int) -> None:
    """Brings the schedule to where the history ends: as a function of epochs and metrics it goes through them again."""
    if state.scheduler is None or not state.history:
        return
    # The plateau schedule reduces what it finds, and the checkpoint has what it was reduced to.
    state.scheduler.update_groups(state.scheduler.base_values)
    for row in state.history:
        state.scheduler.step_update((row['epoch'] + 1) * updates_per_epoch)
        state.scheduler.step(row['epoch'] + 1, row.get('eval_top1'))
