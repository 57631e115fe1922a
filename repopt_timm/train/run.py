"""A training run, from arguments to checkpoints."""

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import model_parameters, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils import ModelEmaV3, init_distributed_device, random_seed, unwrap_model
from timm.utils.clip_grad import dispatch_clip_grad
from torch import nn

from ..datasets import count_classes, data_config_of
from ..errors import explaining
from ..files import write_text
from ..optim import RepOptAdamW, RepOptSGD, clip_grad_norm_
from ..reparam import kind_of, make_grad_mults
from ..scales import Scales
from .engine import DivergedError, TrainState, evaluate, train_one_epoch
from .interruption import InterruptedRunError, postponed_signals, raise_if_interrupted
from .loaders import Loaders, make_datasets, make_loaders
from .loggers import make_loggers
from .parsing import write_config
from .run_checkpoints import (
    CheckpointSaver,
    changed_arguments,
    find_checkpoint,
    restore,
    scales_fingerprint,
)
from .run_folder import ARGUMENTS_FILE, DIVERGED_FILE, LAST_CHECKPOINT, note_time, run_folder
from .run_model import choose_scales, find_variant, is_target, make_model, scales_of_run, wrap
from .run_report import write_report
from .schedule import choose_warmup, make_schedule, replay_schedule
from .searched_scales import note_movement, save_searched
from .validation import check_arguments, check_classes, check_device_name, check_images, check_layout, check_model

__all__ = ['MakeModel', 'Result', 'prepare_device', 'train']

_logger = logging.getLogger(__name__)

_ARCHITECTURE_ARGS = ('depths', 'widths', 'strides', 'use_se', 'act_layer')


class Result:
    """What a run leaves behind.

    Attributes:
        folder: Folder of the run.
        model: The trained model, or its moving average if the run keeps one.
        history: A row for each epoch, see `TrainState`.
        seconds: Time that this call took.
    """

    def __init__(self, folder: Path, model: nn.Module, history: list[dict[str, Any]], seconds: float):
        self.folder = folder
        self.model = model
        self.history = history
        self.seconds = seconds


MakeModel = Callable[[argparse.Namespace, Any, torch.device], tuple[nn.Module, dict[str, Any]]]
"""Makes a model from the arguments, the training set and the device, and further arguments of its optimizer."""


def train(args: argparse.Namespace, make: MakeModel | None = None) -> Result:
    """Runs a training: builds everything from the arguments, trains, evaluates and saves each epoch.

    Args:
        args: What `parse_arguments` returned, after `prepare_device`.
        make: Makes the model, on the device. Defaults to timm's `create_model` with what the arguments say.

    Returns:
        Where the run is, and what came out.

    Raises:
        ValueError: If arguments do not go together.
        FileNotFoundError: If a file that they name does not exist.
        ImportError: If they need a package that is not installed.
        OSError: If a checkpoint cannot be written.
        InterruptedRunError: If Ctrl-C or SIGTERM ended it.
    """
    start = time.perf_counter()
    check_arguments(args)
    device = torch.device(args.device)
    variant, saved_args = find_variant(args.model)
    _resolve(args, variant, saved_args)
    folder = _folder(args)
    choose_warmup(args, folder)
    if make is None:
        choose_scales(args, variant, folder)
    datasets = make_datasets(args)
    check_classes(args.num_classes, count_classes(datasets[0]))
    # The same on all ranks: DDP spreads the first one's weights, but not its moving average.
    random_seed(args.seed)
    with explaining(f'timm cannot make {args.model}' + _with_kwargs('--model-kwargs', args.model_kwargs)):
        more: dict[str, Any] = {}
        if make is None:
            model = make_model(args, scales_of_run(args, variant), datasets[0], device)
        else:
            model, more = make(args, datasets[0], device)
    started = Scales.from_model(model) if kind_of(model) == 'hs' else None
    if args.rank == 0 and args.scales not in (None, 'initial'):
        note_movement(model)
    with explaining(f'timm cannot make the optimizer {args.opt}' + _with_kwargs('--opt-kwargs', args.opt_kwargs)):
        optimizer = create_optimizer_v2(model, **{**optimizer_kwargs(args), **args.opt_kwargs, **more})
    clip = _make_clip(args, model, optimizer)
    autocast, scaler = _precision(args, device)
    with explaining('--input-size, --mean, --std and --crop-pct do not go together'):
        data_config = data_config_of(vars(args), model)
    # Where the weights come from is not in the checkpoint, but what they expect is.
    vars(args).update(data_config)
    loaders = make_loaders(args, datasets, data_config, unwrap_model(model).num_classes, device)
    if len(loaders.train) == 0:
        raise ValueError(
            f'The {len(datasets[0])} training images do not fill one batch of {args.batch_size} per process: choose a '
            f'smaller --batch-size.'
        )
    check_images(datasets, data_config['input_size'])
    if args.channels_last:
        check_layout(model, data_config['input_size'], device)
    check_model(model, data_config['input_size'], device)
    updates = -(-len(loaders.train) // args.grad_accum_steps)
    scheduler, args.total_epochs = make_schedule(optimizer, args, updates)
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    state = TrainState(wrap(model, args, device), optimizer, scheduler, ema, scaler)
    with run_folder(folder) if args.rank == 0 else nullcontext():
        _train_in(folder, args, state, loaders, clip, autocast, updates)
    result = Result(folder, unwrap_model(model if ema is None else ema), state.history, time.perf_counter() - start)
    if args.rank == 0 and started is not None:
        save_searched(result.model, started, folder, args, state.history)
    if args.rank == 0:
        write_report(folder, result.model, args, state.history, result.seconds)
    if args.distributed:
        # What follows on other ranks may read the files of this run.
        torch.distributed.barrier()
    return result


def _train_in(
    folder: Path,
    args: argparse.Namespace,
    state: TrainState,
    loaders: Loaders,
    clip: Callable | None,
    autocast: Callable[[], AbstractContextManager],
    updates: int,
) -> None:
    """Resumes a run in its folder, if asked to, and trains its epochs."""
    saver = CheckpointSaver(folder, args, args.checkpoint_hist)
    source = _resume(folder, args, state)
    replay_schedule(state, updates)
    loss_fn = _make_loss(args).to(args.device)
    primary = args.rank == 0
    if primary:
        notes = ''.join(f'# {line}\n' for line in getattr(args, 'overridden', []))
        write_text(folder / ARGUMENTS_FILE, notes + write_config(args))
        (folder / DIVERGED_FILE).unlink(missing_ok=True)
        if source is not None:
            saver.rebuild(state.history, source)
    loggers = make_loggers(args, folder) if primary else []
    state.start, state.first_epoch = time.perf_counter(), len(state.history)
    with postponed_signals(), _explaining_ends(folder, args, state):
        for epoch in range(len(state.history), args.total_epochs):
            _start_epoch(epoch, loaders, args)
            start = time.perf_counter()
            metrics = train_one_epoch(state, loaders, loss_fn, clip, autocast, epoch, args)
            seconds = time.perf_counter() - start
            _check_weights(state.model, epoch, args)
            row = {
                'epoch': epoch,
                **{name if name == 'lr' else f'train_{name}': value for name, value in metrics.items()},
            }
            if (epoch + 1) % args.val_interval == 0 or epoch + 1 == args.total_epochs:
                row |= evaluate(state, loaders.validation, autocast, epoch, updates, args)
            state.history.append(row)
            if primary:
                saver.save(state)
                note_time(folder, epoch + 1, seconds)
                _log(row, loggers, args)
            if state.scheduler is not None:
                state.scheduler.step(epoch + 1, row.get('eval_top1'))
            raise_if_interrupted()


@contextmanager
def _explaining_ends(folder: Path, args: argparse.Namespace, state: TrainState) -> Iterator[None]:
    """Adds to an early end of a run what it leaves."""
    try:
        yield
    except (DivergedError, InterruptedRunError) as error:
        done = len(state.history)
        saved = 'No epoch was finished, so there is no checkpoint.'
        if done:
            saved = f"The checkpoint of epoch {done} is '{folder / LAST_CHECKPOINT}'."
        if isinstance(error, InterruptedRunError):
            _logger.info(f'Stopped in epoch {min(done + 1, args.total_epochs)} of {args.total_epochs}. {saved}')
            raise
        if args.rank == 0:
            write_text(folder / DIVERGED_FILE, f'{error}\n')
        advice = 'Try a lower --lr, more --warmup-epochs, or --clip-grad'
        raise DivergedError(f'{error} {saved} {advice}{" and --resume with --override" if done else ""}.') from None


def _resume(folder: Path, args: argparse.Namespace, state: TrainState) -> Path | None:
    """Brings the state to where the run stopped, and returns the checkpoint; None for a new run."""
    found = find_checkpoint(folder, args.resume, args.override) if args.resume else None
    if not args.resume and (folder / LAST_CHECKPOINT).exists():
        raise _already_there(folder)
    if args.distributed:
        _check_epochs(len(found[1]['history']) if found else 0, folder, args.world_size)
    if found is None:
        return None
    path, checkpoint = found
    _check_changes(path, checkpoint, args, scales_fingerprint(unwrap_model(state.model)))
    with explaining(f"'{path}' does not hold the state of this run"):
        restore(state, checkpoint, str(path), args.override)
    _logger.info(f'Resuming {path} after epoch {len(state.history)}.')
    return path


def _check_changes(path: Path, checkpoint: dict[str, Any], args: argparse.Namespace, fingerprint: str | None) -> None:
    saved = checkpoint.get('args')
    changed = changed_arguments(saved, args)
    changes = ', '.join(f'{name} {old!r} -> {new!r}' for name, (old, new) in changed.items())
    args.overridden = getattr(saved, 'overridden', [])
    found = checkpoint.get('scales_fingerprint', fingerprint)
    if found != fingerprint:
        raise ValueError(
            f"'{path}' was saved with the scales {(found or 'none')[:12]}, not {(fingerprint or 'none')[:12]}. Resume "
            f'with the --scales of the run, or start a new one.'
            + (f' Other differences: {changes}.' if changes else '')
        )
    if 'opt' in changed:
        raise ValueError(
            f"'{path}' is of a run with the optimizer {changed['opt'][0]}, whose state {args.opt} cannot go on from "
            f'({changes}). Resume with --opt {changed["opt"][0]}, or start a new run with --initial-checkpoint.'
        )
    if changed and not args.override:
        raise ValueError(
            f"'{path}' is of a run with other arguments: {changes}. Resume with its own, which {ARGUMENTS_FILE} "
            f'beside it holds, or apply the new ones from here on with --override.'
        )
    if changed:
        done = len(checkpoint['history'])
        args.overridden = [*args.overridden, f'after epoch {done}: {changes}']
        _logger.warning(f'After epoch {done} the run goes on with other arguments: {changes}.')
    epochs = getattr(saved, 'epochs', args.epochs)
    if epochs != args.epochs:
        _logger.warning(f'The schedule is now that of {args.epochs} epochs, not of {epochs}.')


def _check_weights(model: nn.Module, epoch: int, args: argparse.Namespace) -> None:
    # The loss of the last step was computed before it.
    for name, parameter in unwrap_model(model).named_parameters():
        if not parameter.isfinite().all():
            raise DivergedError(
                f"The parameter '{name}' is not finite after epoch {epoch + 1} of {args.total_epochs}, although its "
                f'training loss is, at learning rate {args.lr:g}.'
            )


def _log(row: dict[str, Any], loggers: list[Callable], args: argparse.Namespace) -> None:
    shown = {**row, 'epoch': row['epoch'] + 1}
    for log in loggers:
        log(shown)
    values = ', '.join(f'{key} {value:.4g}' for key, value in row.items() if key != 'epoch')
    _logger.info(f'epoch {shown["epoch"]}/{args.total_epochs}: {values}')


def _with_kwargs(flag: str, kwargs: dict[str, Any]) -> str:
    return f' with {flag} ' + ' '.join(f'{name}={value}' for name, value in kwargs.items()) if kwargs else ''


def prepare_device(args: argparse.Namespace) -> None:
    """Joins the processes of a parallel run, if it is one, and sets `device`, `distributed`, `rank`, `world_size`."""
    check_device_name(args.device)
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    args.device = str(init_distributed_device(args))


def _resolve(args: argparse.Namespace, variant: str, saved_args: dict[str, Any]) -> None:
    """Replaces defaults that depend on the model and on other arguments."""
    # What a repository's config says of the architecture goes into the checkpoint, which does not name the repository.
    kept = {name: saved_args[name] for name in _ARCHITECTURE_ARGS if name in saved_args}
    args.model_kwargs = {**kept, **args.model_kwargs}
    args.gp = args.gp or saved_args.get('global_pool')
    if args.opt is None:
        args.opt = 'repopt_sgd' if is_target(variant) else 'sgd'
    if args.lr is None:
        args.lr = args.lr_base * _batch_ratio(args)
    # Again, as it depends on the optimizer.
    check_arguments(args)


def _batch_ratio(args: argparse.Namespace) -> float:
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(name in args.opt for name in ('ada', 'lamb')) else 'linear')
    return ratio**0.5 if scale == 'sqrt' else ratio


def _folder(args: argparse.Namespace) -> Path:
    if args.resume and args.resume != 'auto':
        return Path(args.resume).parent
    if args.resume and not args.experiment:
        raise ValueError('--resume without a file needs --experiment, to know which run in --output to continue.')
    args.experiment = args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}'
    folder = Path(args.output) / args.experiment
    if not args.resume and (folder / LAST_CHECKPOINT).exists():
        raise _already_there(folder)
    return folder


def _already_there(folder: Path) -> ValueError:
    return ValueError(
        f"There is a run in '{folder}' already. Continue it with --resume, or choose another --experiment."
    )


def _check_epochs(done: int, folder: Path, world_size: int) -> None:
    epochs = [0] * world_size
    torch.distributed.all_gather_object(epochs, done)
    if len(set(epochs)) > 1:
        raise ValueError(
            f"The processes would go on after different epochs: {', '.join(map(str, epochs))}, by rank. '{folder}' has "
            f'to be on a disk that all nodes share.'
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


def _precision(
    args: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], AbstractContextManager], torch.amp.GradScaler | None]:
    if not args.amp:
        return nullcontext, None
    autocast = partial(torch.autocast, device.type, dtype=getattr(torch, args.amp_dtype))
    return autocast, torch.amp.GradScaler(device.type) if args.amp_dtype == 'float16' else None


def _make_loss(args: argparse.Namespace) -> nn.Module:
    mixed = args.mixup > 0 or args.cutmix > 0
    if args.bce_loss:
        return BinaryCrossEntropy(smoothing=0.0 if mixed else args.smoothing)
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def _start_epoch(epoch: int, loaders: Any, args: argparse.Namespace) -> None:
    # One seed per epoch is all the random state there is: a resumed run draws what an uninterrupted one would.
    random_seed(args.seed + 1009 * epoch, args.rank)
    for loader in (loaders.train, loaders.validation):
        if hasattr(getattr(loader, 'sampler', None), 'set_epoch'):
            loader.sampler.set_epoch(epoch)
        if hasattr(getattr(loader, 'dataset', None), 'set_epoch'):
            loader.dataset.set_epoch(epoch)
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        for mixup in (loaders.mixup, loaders.collate_mixup):
            if mixup is not None:
                mixup.mixup_enabled = False
