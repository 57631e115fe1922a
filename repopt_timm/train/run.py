"""A training run, from arguments to checkpoints."""

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.loss import BinaryCrossEntropy
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils import ModelEmaV3, init_distributed_device, random_seed, unwrap_model
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn

from ..datasets import data_config_of
from ..errors import explaining
from ..files import write_text
from ..optim import RepOptAdamW, RepOptSGD, clip_grad_norm_
from ..reparam import kind_of, make_grad_mults
from ..scales import Scales
from ..trained_scales import arguments_of
from .engine import DivergedError, TrainState, evaluate, ranked, train_one_epoch
from .interruption import InterruptedRunError, postponed_signals, raise_if_interrupted
from .loaders import Loaders, class_sizes, make_datasets, make_loaders
from .loggers import make_loggers
from .parsing import write_config
from .resolution import folder_of, resolve
from .run_checkpoints import changed_arguments, find_checkpoint, rebuild, restore, save, scales_fingerprint
from .run_folder import ARGUMENTS_FILE, DIVERGED_FILE, run_folder
from .run_model import make_model, scales_of_run, wrap
from .run_report import save_searched, write_report
from .schedule import make_schedule, replay_schedule
from .validation import check_device_name, check_layout, check_model

_logger = logging.getLogger(__name__)

MakeModel = Callable[[argparse.Namespace, Any, torch.device], tuple[nn.Module, dict[str, Any]]]
"""Makes a model from the arguments, the training set and the device, and further arguments of its optimizer."""


@dataclass
class Result:
    """What a run leaves behind: the model is its moving average if it keeps one, the seconds are of this call."""

    folder: Path
    model: nn.Module
    history: list[dict[str, Any]]
    seconds: float
    args: argparse.Namespace


def prepare_device(args: argparse.Namespace) -> None:
    """Joins the processes of a parallel run, if it is one, and sets `device`, `distributed`, `rank`, `world_size`."""
    check_device_name(args.device)
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    args.device = str(init_distributed_device(args))


def train(args: argparse.Namespace, make: MakeModel | None = None) -> Result:
    """Builds everything from the arguments, trains, evaluates and saves each epoch.

    The arguments are what `parse_arguments` returned, after `prepare_device`; `make` defaults to timm's `create_model`.
    """
    start = time.perf_counter()
    args = resolve(args, choose_scales=make is None)
    device, folder, primary = torch.device(args.device), folder_of(args), args.rank == 0
    datasets = make_datasets(args)
    # The same on all ranks: DDP spreads the first one's weights, but not its moving average.
    random_seed(args.seed)
    with explaining(f'timm cannot make {args.model}'):
        more: dict[str, Any] = {}
        if make is None:
            model = make_model(args, scales_of_run(args), datasets[0], device)
        else:
            model, more = make(args, datasets[0], device)
    started = Scales.from_model(model) if kind_of(model) == 'hs' else None
    with explaining(f'timm cannot make the optimizer {args.opt}'):
        optimizer: Any = create_optimizer_v2(model, **optimizer_kwargs(args), **{**args.opt_kwargs, **more})
    clip = _make_clip(args, model, optimizer)
    with explaining('The arguments of images do not go together'):
        data_config = data_config_of(vars(args), model)
        loaders = make_loaders(args, datasets, data_config, unwrap_model(model).num_classes, device)
    if len(loaders.train) == 0:
        raise ValueError(
            f'The {len(datasets[0])} training images do not fill one batch of {args.batch_size} per process: choose a '
            f'smaller --batch-size.'
        )
    input_size = data_config['input_size']
    if args.channels_last:
        check_layout(model, input_size, device)
    check_model(model, datasets, input_size, device)
    loss = _make_loss(args, datasets[0], unwrap_model(model).num_classes).to(device)
    updates = -(-len(loaders.train) // args.grad_accum_steps)
    scheduler, epochs = make_schedule(optimizer, args, updates)
    # Where the weights come from is not in the checkpoint, but what they expect is.
    args = argparse.Namespace(**{**vars(args), **data_config, 'total_epochs': epochs})
    ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
    scaler = torch.amp.GradScaler(device.type) if args.amp and args.amp_dtype == 'float16' else None
    state = TrainState(wrap(model, args, device), optimizer, scheduler, ema, scaler)
    with run_folder(folder) if primary else nullcontext():
        _train_in(folder, args, state, loaders, loss, clip, updates)
    result = Result(folder, unwrap_model(ema or model), state.history, time.perf_counter() - start, args)
    if primary:
        if started is not None:
            save_searched(result.model, started, folder, args, state.history)
        write_report(folder, result.model, args, state, result.seconds, datasets[0])
    if args.distributed:
        # What follows on other ranks may read the files of this run.
        torch.distributed.barrier()
    return result


def _train_in(
    folder: Path,
    args: argparse.Namespace,
    state: TrainState,
    loaders: Loaders,
    loss: nn.Module,
    clip: Callable | None,
    updates: int,
) -> None:
    """Resumes a run in its folder, if asked to, and trains its epochs."""
    source, primary = _resume(folder, args, state), args.rank == 0
    replay_schedule(state, updates)
    autocast: Callable[[], AbstractContextManager] = nullcontext
    if args.amp:
        autocast = partial(torch.autocast, torch.device(args.device).type, dtype=getattr(torch, args.amp_dtype))
    if primary:
        notes = ''.join(f'# {line}\n' for line in state.overridden)
        write_text(folder / ARGUMENTS_FILE, notes + write_config(args))
        (folder / DIVERGED_FILE).unlink(missing_ok=True)
        if source is not None:
            rebuild(folder, source, state, args)
    loggers = make_loggers(args, folder) if primary else []
    state.start, state.first_epoch = time.perf_counter(), len(state.history)
    with _noting_ends(folder, primary), postponed_signals():
        for epoch in range(len(state.history), args.total_epochs):
            if _has_stopped_improving(state.history, args.patience):
                break
            _start_epoch(epoch, loaders, args)
            start = time.perf_counter()
            metrics = train_one_epoch(state, loaders, loss, clip, autocast, epoch, args)
            state.times.append({'epoch': epoch, 'train_seconds': round(time.perf_counter() - start, 3)})
            _check_weights(state.model, epoch, args)
            row = {'epoch': epoch, 'lr': metrics.pop('lr')} | {f'train_{key}': metrics[key] for key in metrics}
            if (epoch + 1) % args.val_interval == 0 or epoch + 1 == args.total_epochs:
                row |= evaluate(state, loaders.validation, autocast, epoch, updates, args)
            state.history.append(row)
            if primary:
                save(folder, state, args)
                for log in loggers:
                    log({**row, 'epoch': epoch + 1})
                values = ', '.join(f'{key} {value:.4g}' for key, value in row.items() if key != 'epoch')
                _logger.info(f'epoch {epoch + 1}/{args.total_epochs}: {values}')
            if state.scheduler is not None:
                state.scheduler.step(epoch + 1, row.get('eval_top1'))
            raise_if_interrupted()
        last = state.history[-1]
        if state.predictions is None or 'eval_top1' not in last:
            # The run was finished before, or is now that it has fewer epochs than were asked for.
            found = evaluate(state, loaders.validation, autocast, last['epoch'], updates, args)
            if 'eval_top1' not in last:
                last |= found
                if primary:
                    save(folder, state, args)


def _has_stopped_improving(history: list[dict[str, Any]], patience: int | None) -> bool:
    validated = [row['epoch'] for row in history if 'eval_top1' in row]
    best = ranked(history)
    return bool(patience and best) and validated[-1] - best[0]['epoch'] >= (patience or 0)


@contextmanager
def _noting_ends(folder: Path, primary: bool) -> Iterator[None]:
    """Adds to an early end of a run where it was, and what to try."""
    try:
        yield
    except InterruptedRunError as error:
        error.folder = folder
        raise
    except DivergedError as error:
        if primary:
            write_text(folder / DIVERGED_FILE, f'{error}\n')
        raise DivergedError(
            f'{error} Try a lower --lr, more --warmup-epochs, or --clip-grad, with --resume and --override if an epoch '
            f'was finished.'
        ) from None


def _resume(folder: Path, args: argparse.Namespace, state: TrainState) -> Path | None:
    """Brings the state to where the run stopped; returns the checkpoint, if there is one."""
    found = find_checkpoint(folder, args.resume, args.override) if args.resume else None
    if args.distributed:
        epochs: list[Any] = [0] * args.world_size
        torch.distributed.all_gather_object(epochs, len(found[1]['history']) if found else 0)
        if len(set(epochs)) > 1:
            raise ValueError(
                f"The processes would go on after different epochs: {', '.join(map(str, epochs))}, by rank. '{folder}' "
                f'has to be on a disk that all nodes share.'
            )
    if found is None:
        return None
    path, checkpoint = found
    saved = arguments_of(checkpoint)
    changed = changed_arguments(saved, vars(args))
    changes = ', '.join(f'{name} {old!r} -> {new!r}' for name, (old, new) in changed.items())
    ours = scales_fingerprint(unwrap_model(state.model))
    theirs = checkpoint.get('scales_fingerprint', ours)
    if theirs != ours:
        raise ValueError(
            f"'{path}' was saved with the scales {(theirs or 'none')[:12]}, not {(ours or 'none')[:12]}. Resume with "
            f'the --scales of the run, or start a new one. Other differences: {changes or "none"}.'
        )
    # No optimizer goes on from the state of another.
    if changed and not (args.override and 'opt' not in changed):
        raise ValueError(
            f"'{path}' is of a run with other arguments: {changes}. Resume with its own, which {ARGUMENTS_FILE} "
            f'beside it holds, or apply the new ones from here on with --override, which --opt does not allow.'
        )
    restore(state, checkpoint, str(path), args.override)
    if saved.get('epochs') != args.epochs:
        _logger.warning(f'The schedule is now that of {args.epochs} epochs, not of {saved.get("epochs")}.')
    state.overridden = list(saved.get('overridden', []))
    if changed:
        state.overridden.append(f'after epoch {len(state.history)}: {changes}')
        _logger.warning(f'The run goes on with other arguments {state.overridden[-1]}.')
    _logger.info(f'Resuming {path} after epoch {len(state.history)}.')
    return path


def _check_weights(model: nn.Module, epoch: int, args: argparse.Namespace) -> None:
    # The loss of the last step was computed before it.
    for name, parameter in unwrap_model(model).named_parameters():
        if not parameter.isfinite().all():
            raise DivergedError(
                f"The parameter '{name}' is not finite after epoch {epoch + 1} of {args.total_epochs}, although its "
                f'training loss is, at learning rate {args.lr:g}.'
            )


def _make_clip(args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable | None:
    if args.clip_grad is None:
        return None
    base = getattr(optimizer, '_base_optimizer', optimizer)
    if not isinstance(base, (RepOptSGD, RepOptAdamW)):
        # Adaptive clipping is not for the classifier (arXiv 2102.06171).
        parameters = list(model_parameters(model, exclude_head=args.clip_mode == 'agc'))
        return partial(dispatch_clip_grad, parameters, args.clip_grad, mode=args.clip_mode)
    # The CSLA norm needs the Grad Mults of SGD, whatever the optimizer.
    mults = base.grad_mults if isinstance(base, RepOptSGD) else make_grad_mults(model)
    return partial(clip_grad_norm_, list(model.parameters()), args.clip_grad, mults)


def _make_loss(args: argparse.Namespace, dataset: Any, num_classes: int) -> nn.Module:
    # Mixed targets are smoothed where they are mixed.
    smoothing = 0.0 if args.mixup > 0 or args.cutmix > 0 else args.smoothing
    sizes = class_sizes(dataset, num_classes)
    weight: Tensor | None = None
    if args.class_weights:
        if sizes is None:
            raise ValueError('--class-weights needs data that list their labels, such as a folder of images.')
        weight = sizes.sum() / (num_classes * sizes.clamp(min=1))
    elif args.rank == 0 and not args.sampler and sizes is not None and sizes.max() >= 10 * sizes.min().clamp(min=1):
        _logger.info(
            f'The largest class has {sizes.max():.0f} images, the smallest {sizes.min():.0f}: '
            f'--class-weights balanced or --sampler balanced lets them count alike.'
        )
    if args.bce_loss:
        return BinaryCrossEntropy(
            smoothing,
            target_threshold=args.bce_target_thresh,
            weight=weight,
            sum_classes=args.bce_sum,
            pos_weight=args.bce_pos_weight,
        )
    return nn.CrossEntropyLoss(weight, label_smoothing=smoothing)


def _start_epoch(epoch: int, loaders: Loaders, args: argparse.Namespace) -> None:
    # One seed per epoch is all the random state there is: a resumed run draws what an uninterrupted one would.
    random_seed(args.seed + 1009 * epoch, args.rank)
    for loader in (loaders.train, loaders.validation):
        for part in ('sampler', 'dataset'):
            set_epoch = getattr(getattr(loader, part, None), 'set_epoch', None)
            if set_epoch is not None:
                set_epoch(epoch)
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        for mixing in (loaders.train, loaders.mixup):
            if mixing is not None:
                mixing.mixup_enabled = False
