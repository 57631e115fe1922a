"""The learning rate schedule of a run: how long it warms up, and where it is when a run is resumed."""

import argparse
import math

import timm
import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler

from ..errors import explaining
from .engine import TrainState


def choose_schedule(
    epochs: int, sched: str = 'cosine', warmup: float | None = None, on_updates: bool = False
) -> tuple[float, bool]:
    """Returns the epochs of warm-up and whether the schedule is stepped on updates.

    A schedule stepped on epochs spends the whole first epoch at the lowest learning rate: too much of a short run.
    """
    on_updates = on_updates or (epochs < 50 and sched not in ('plateau', 'none'))
    if warmup is None:
        warmup = min(5.0, epochs / 5)
        warmup = warmup if on_updates else math.floor(warmup)
    return warmup, on_updates


def make_schedule(
    optimizer: torch.optim.Optimizer, args: argparse.Namespace, updates: int
) -> tuple[Scheduler | None, int]:
    """Returns timm's schedule, None for `--sched none`, and the epochs with warm-up prefix and cool-down."""
    with explaining(f'timm cannot make the schedule {args.sched}'):
        scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates)
    if scheduler is None and args.sched != 'none':
        # timm would train with a constant learning rate, without warm-up.
        raise ValueError(f"timm {timm.__version__} has no schedule '{args.sched}': upgrade timm, or choose another.")
    if args.cooldown_epochs and not hasattr(scheduler, 'get_cycle_length'):
        raise ValueError(f'timm has no --cooldown-epochs after the schedule {args.sched}: add them to --epochs.')
    return scheduler, math.ceil(epochs)


def replay_schedule(state: TrainState, updates_per_epoch: int) -> None:
    """Brings the schedule to where the history ends: it repeats its steps for all epochs."""
    if state.scheduler is None or not state.history:
        return
    # The plateau schedule lowers the rates that it finds, and the checkpoint holds lowered ones.
    state.scheduler.update_groups(state.scheduler.base_values)
    for row in state.history:
        state.scheduler.step_update((row['epoch'] + 1) * updates_per_epoch)
        state.scheduler.step(row['epoch'] + 1, row.get('eval_top1'))
