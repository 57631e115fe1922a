"""One epoch of training, and its evaluation."""

import argparse
import io
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.utils import ModelEmaV3, accuracy, distribute_bn
from torch import Tensor, nn
from tqdm import tqdm

from .interruption import raise_if_interrupted

_logger = logging.getLogger(__name__)


class DivergedError(ValueError):
    """The training loss, or a weight, is infinite or NaN."""


@dataclass
class TrainState:
    """What changes while a run goes on; a checkpoint holds what a resumed run cannot work out by itself.

    A row of the history has `epoch`, `lr`, `train_loss`, `train_accuracy` of unmixed labels; if it was validated
    `eval_loss`, `eval_top1`, `eval_top5`, and with a moving average the model's own `eval_raw_*`. Times are kept apart,
    so that repeated runs have the same history. `predictions` holds labels and predictions of the last validation, of
    shape (2, images).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    ema: ModelEmaV3 | None
    scaler: torch.amp.GradScaler
    history: list[dict[str, Any]] = field(default_factory=list)
    times: list[dict[str, Any]] = field(default_factory=list)
    overridden: list[str] = field(default_factory=list)
    predictions: Tensor | None = None
    start: float = field(default_factory=time.perf_counter)
    first_epoch: int = 0


def ranked(history: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of validated epochs, the best first; rows with a value that is not finite are left out."""
    rows = [row for row in history if 'eval_top1' in row and all(map(math.isfinite, row.values()))]
    return sorted(rows, key=lambda row: (-row['eval_top1'], row['epoch']))


def _batches(
    loader: Any, title: str, args: argparse.Namespace, describe: Callable[[int], str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches on the device, under tqdm's bar; off a terminal, prints a line every `log_interval` batches."""
    lines = args.rank == 0 and not sys.stderr.isatty()
    with tqdm(
        total=len(loader),
        desc=title,
        unit='batch',
        leave=False,
        disable=args.rank > 0,
        # A line is the bar's own text, printed when it is due.
        file=io.StringIO() if lines else None,
        bar_format='{desc} {n_fmt}/{total_fmt}{postfix}, {rate_fmt}, ETA {remaining}' if lines else None,
    ) as bar:
        for done, (images, target) in enumerate(loader, 1):
            if args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            yield images, target
            bar.update(1)
            # The run logs the end of an epoch.
            if not bar.disable and done % args.log_interval == 0 and done < len(loader):
                bar.set_postfix_str(describe(done), refresh=False)
                if lines:
                    print(bar, flush=True)
            raise_if_interrupted()


def train_one_epoch(
    state: TrainState,
    loader: Any,
    loss_fn: nn.Module,
    clip: Callable[[], Any] | None,
    autocast: Callable[[], AbstractContextManager],
    epoch: int,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Trains for one epoch. Raises a DivergedError if the loss is not finite, checked every `log_interval` batches.

    Returns `loss`, the mean over the images, `accuracy` in percent over those whose label is unmixed, and `lr`.
    """
    model: Any = state.model
    optimizer, scaler = state.optimizer, state.scaler
    model.train()
    lr = optimizer.param_groups[0]['lr']
    batches = len(loader)
    # A last, smaller group of accumulated batches is a step too.
    updates_per_epoch = -(-batches // args.grad_accum_steps)
    # On the device: reading a value every batch would make a GPU wait for the host.
    sums = torch.zeros(4, dtype=torch.float64, device=args.device)

    def describe(done: int) -> str:
        loss, count, correct, counted = sums.tolist()
        accurate = f' acc {correct / counted:.2f}%' if counted else ''
        part = epoch + done / batches
        pace = (time.perf_counter() - state.start) / (part - state.first_epoch)
        left = timedelta(seconds=round(pace * (args.total_epochs - part)))
        return f'loss {loss / count:.4f}{accurate}, run ETA {left}'

    progress = _batches(loader, f'epoch {epoch + 1}/{args.total_epochs} train', args, describe)
    optimizer.zero_grad()
    for index, (images, target) in enumerate(progress):
        update, position = divmod(index, args.grad_accum_steps)
        group = min(args.grad_accum_steps, batches - update * args.grad_accum_steps)
        last = position == group - 1
        with model.no_sync() if args.distributed and not last else nullcontext():
            with autocast():
                output = model(images)
                loss = loss_fn(output, target)
            scaler.scale(loss / group).backward()
        if last:
            if clip is not None:
                scaler.unscale_(optimizer)
                clip()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if state.ema is not None:
                state.ema.update(model, step=epoch * updates_per_epoch + update)
            if state.scheduler is not None:
                state.scheduler.step_update(epoch * updates_per_epoch + update + 1)
        count = len(images)
        sums[0] += loss.detach() * count
        sums[1] += count
        if target.ndim == 1:
            sums[2] += accuracy(output.detach().float(), target)[0] * count
            sums[3] += count
        if ((index + 1) % args.log_interval == 0 or index + 1 == batches) and not sums[0].isfinite():
            raise DivergedError(
                f'The training loss of epoch {epoch + 1} of {args.total_epochs} became non-finite by step {index + 1}, '
                f'at learning rate {optimizer.param_groups[0]["lr"]:g}.'
            )
    sums = _reduce(sums, args)
    metrics = {'loss': (sums[0] / sums[1]).item(), 'lr': lr}
    if sums[3] > 0:
        metrics['accuracy'] = (sums[2] / sums[3]).item()
    return metrics


@torch.no_grad()
def validate(
    model: nn.Module,
    loader: Any,
    autocast: Callable[[], AbstractContextManager],
    title: str,
    args: argparse.Namespace,
) -> tuple[dict[str, float], Tensor]:
    """Evaluates a model.

    Returns `loss` (cross entropy), `top1` and `top5` in percent, `top5` over as many classes as there are if fewer; and
    labels and predictions of this process, of the shape (2, images).
    """
    if args.distributed and args.dist_bn:
        distribute_bn(model, args.world_size, args.dist_bn == 'reduce')
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=args.device)

    def describe(done: int) -> str:
        loss, top1, _, count = sums.tolist()
        return f'loss {loss / count:.4f} top1 {top1 / count:.2f}%'

    # timm's sampler repeats the first images, so that all processes have equally many.
    left = sys.maxsize
    if args.distributed and isinstance(loader.sampler, OrderedDistributedSampler):
        left = -(-(len(loader.dataset) - args.rank) // args.world_size)
    found = [torch.empty(2, 0, dtype=torch.int64, device=args.device)]
    for images, target in _batches(loader, title, args, describe):
        with autocast():
            output = model(images)
        output, target = output[:left].float(), target[:left]
        count = len(target)
        left -= count
        if not count:
            continue
        top1, top5 = accuracy(output, target, topk=(1, 5))
        loss = nn.functional.cross_entropy(output, target)
        sums += torch.stack([loss, top1, top5, torch.ones_like(loss)]) * count
        found.append(torch.stack([target, output.argmax(1)]))
    loss, top1, top5, count = _reduce(sums, args).tolist()
    predictions = [torch.cat(found, 1).cpu()] * args.world_size
    if args.distributed:
        dist.all_gather_object(predictions, predictions[0])
    return {'loss': loss / count, 'top1': top1 / count, 'top5': top5 / count}, torch.cat(predictions, 1)


def _reduce(sums: Tensor, args: argparse.Namespace) -> Tensor:
    if args.distributed:
        dist.all_reduce(sums)
    return sums.cpu()


def evaluate(
    state: TrainState, loader: Any, autocast: Callable, epoch: int, updates: int, args: argparse.Namespace
) -> dict[str, float]:
    """Validates after an epoch, and keeps the predictions in the state.

    Returns `eval_*`, of the average of the weights if the run keeps one, and then of the model itself `eval_raw_*`.
    """
    title = f'epoch {epoch + 1}/{args.total_epochs} validation'
    found, state.predictions = validate(state.model, loader, autocast, title, args)
    if state.ema is None:
        return {f'eval_{name}': value for name, value in found.items()}
    averaged, state.predictions = validate(state.ema.module, loader, autocast, f'{title} of the average', args)
    # The share of the average that is from before its second update; timm copies the weights until then.
    share = math.prod(state.ema.get_decay(step) for step in range(2, (epoch + 1) * updates))
    if share > 0.1:
        _logger.warning(
            f'The average has not warmed up: after epoch {epoch + 1} {share:.0%} of it are the weights that the run '
            f'started from. eval_raw_top1 is of the model itself; --model-ema-warmup or a lower --model-ema-decay '
            f'warms up sooner.'
        )
    return {f'eval_{name}': value for name, value in averaged.items()} | {
        f'eval_raw_{name}': value for name, value in found.items()
    }
