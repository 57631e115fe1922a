"""A training run, from arguments to checkpoints."""

import argparse
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
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
from .engine import DivergedError, TrainState, evaluate, ranked, train_one_epoch
from .interruption import InterruptedRunError, postponed_signals, raise_if_interrupted
from .loaders import labels_of, make_datasets, make_loaders
from .parsing import write_config
from .resolution import folder_of, resolve
from .run_checkpoints import resume, save
from .run_folder import ARGUMENTS_FILE, DIVERGED_FILE, run_folder
from .run_model import make_model, scales_of_run, wrap
from .run_report import save_searched, write_report
from .schedule import make_schedule, replay_schedule
from .validation import check_device_name, check_layout, check_model, warn_of_residuals

_logger = logging.getLogger(__name__)


def prepare_device(args: argparse.Namespace) -> None:
    """Joins the processes of a parallel run, if it is one, and sets `device`, `distributed`, `rank`, `world_size`."""
    check_device_name(args.device)
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    args.device = str(init_distributed_device(args))
    if args.rank:
        # All ranks would print the same lines, except the warnings of damaged images.
        logging.getLogger('repopt_timm').setLevel(logging.ERROR)
        logging.getLogger('repopt_timm.datasets').setLevel(logging.WARNING)
    slow = args.device == 'cpu' and torch.backends.cpu.get_cpu_capability() in ('AVX2', 'NO AVX')
    if slow and args.amp:
        _logger.warning(
            'This processor has no AVX-512: in lower precision it is several times slower than in float32. Remove '
            '--amp, or add --no-amp if a config sets it.'
        )


def train(args: argparse.Namespace, make: Callable[..., tuple[nn.Module, dict[str, Any]]] | None = None) -> Path:
    """Builds everything from the arguments, trains, evaluates and saves each epoch; returns the folder of the run.

    The arguments are what `parse_arguments` returned, after `prepare_device`. `make` gets them, the training set and
    the device, and returns a model and further arguments of its optimizer; it defaults to timm's `create_model`.
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
    clip = make_clip(args, model, optimizer)
    with explaining('The arguments of images do not go together'):
        data_config = data_config_of(vars(args), model)
        loaders = make_loaders(args, datasets, data_config, unwrap_model(model).num_classes, device)
    if len(loaders[0]) == 0:
        raise ValueError(
            f'The {len(datasets[0])} training images do not fill one batch of {args.batch_size} per process: choose a '
            f'smaller --batch-size.'
        )
    input_size = data_config['input_size']
    if args.channels_last:
        check_layout(model, input_size, device, getattr(torch, args.amp_dtype) if args.amp else None)
    check_model(model, datasets, input_size, device)
    if primary:
        warn_of_residuals(model, input_size, device)
    loss = make_loss(args, datasets[0], unwrap_model(model).num_classes).to(device)
    updates = -(-len(loaders[0]) // args.grad_accum_steps)
    scheduler, epochs = make_schedule(optimizer, args, updates)
    # Checkpoints say how images are prepared, with the model's defaults filled in.
    args = argparse.Namespace(**{**vars(args), **data_config, 'total_epochs': epochs})
    ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp and args.amp_dtype == 'float16')
    state = TrainState(wrap(model, args, device), optimizer, scheduler, ema, scaler)
    with run_folder(folder) if primary else nullcontext():
        try:
            _train_in(folder, args, state, loaders, loss, clip, updates)
        except InterruptedRunError as error:
            error.folder = folder
            raise
        except DivergedError as error:
            if primary:
                write_text(folder / DIVERGED_FILE, f'{error}\n')
            raise DivergedError(
                f'{error} Try a lower --lr, more --warmup-epochs, or --clip-grad, with --resume and --override if an '
                f'epoch was finished.'
            ) from None
    if primary:
        final = unwrap_model(ema or model)
        if started is not None:
            save_searched(final, started, folder, args, state.history)
        write_report(folder, final, args, state, time.perf_counter() - start, datasets[0])
    if args.distributed:
        # What follows on other ranks may read the files of this run.
        torch.distributed.barrier()
    return folder


def _train_in(
    folder: Path,
    args: argparse.Namespace,
    state: TrainState,
    loaders: tuple[Any, Any],
    loss: nn.Module,
    clip: Callable | None,
    updates: int,
) -> None:
    """Resumes a run in its folder, if asked to, and trains its epochs."""
    resume(folder, state, args)
    replay_schedule(state, updates)
    dtype = getattr(torch, args.amp_dtype)
    autocast = partial(torch.autocast, torch.device(args.device).type, dtype=dtype, enabled=args.amp)
    primary = args.rank == 0
    if primary:
        notes = ''.join(f'# {line}\n' for line in state.overridden)
        write_text(folder / ARGUMENTS_FILE, notes + write_config(args))
        (folder / DIVERGED_FILE).unlink(missing_ok=True)
    loggers = _make_loggers(args, folder) if primary else []
    state.start, state.first_epoch = time.perf_counter(), len(state.history)
    with postponed_signals():
        for epoch in range(len(state.history), args.total_epochs):
            validated, best = [row['epoch'] for row in state.history if 'eval_top1' in row], ranked(state.history)
            if args.patience and best and validated[-1] - best[0]['epoch'] >= args.patience:
                break
            # A resumed run draws the same numbers, although no checkpoint holds random state.
            random_seed(args.seed + 1009 * epoch, args.rank)
            for loader in loaders:
                for each in (loader.sampler, loader.dataset):
                    if hasattr(each, 'set_epoch'):
                        each.set_epoch(epoch)
            if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
                loaders[0].mixup_enabled = False
            start = time.perf_counter()
            metrics = train_one_epoch(state, loaders[0], loss, clip, autocast, epoch, args)
            state.times.append({'epoch': epoch, 'train_seconds': round(time.perf_counter() - start, 3)})
            # No loss shows what the last step did to the weights.
            for name, parameter in unwrap_model(state.model).named_parameters():
                if not parameter.isfinite().all():
                    raise DivergedError(
                        f"The parameter '{name}' is not finite after epoch {epoch + 1} of {args.total_epochs}, "
                        f'although its training loss is, at learning rate {args.lr:g}.'
                    )
            row = {'epoch': epoch, 'lr': metrics.pop('lr')} | {f'train_{key}': metrics[key] for key in metrics}
            if (epoch + 1) % args.val_interval == 0 or epoch + 1 == args.total_epochs:
                row |= evaluate(state, loaders[1], autocast, epoch, updates, args)
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
            # No epoch was trained in this call, or the run was resumed with fewer --epochs or another --patience.
            found = evaluate(state, loaders[1], autocast, last['epoch'], updates, args)
            if 'eval_top1' not in last:
                last |= found
                if primary:
                    save(folder, state, args)


def make_clip(args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable | None:
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


def make_loss(args: argparse.Namespace, dataset: Any, num_classes: int) -> nn.Module:
    # Mixed targets are smoothed where they are mixed.
    smoothing = 0.0 if args.mixup > 0 or args.cutmix > 0 else args.smoothing
    labels = labels_of(dataset)
    sizes = None if labels is None else labels.bincount(minlength=num_classes).float()
    weight: Tensor | None = None
    if args.class_weights:
        if sizes is None:
            raise ValueError('--class-weights needs data that list their labels, such as a folder of images.')
        weight = sizes.sum() / (num_classes * sizes.clamp(min=1))
    elif not args.sampler and sizes is not None and sizes.max() >= 10 * sizes.min().clamp(min=1):
        _logger.info(
            f'The largest class has {sizes.max():.0f} images, the smallest {sizes.min():.0f}: '
            f'--class-weights balanced or --sampler balanced gives all classes the same weight.'
        )
    if args.bce_loss:
        return BinaryCrossEntropy(
            smoothing,
            target_threshold=args.bce_target_thresh,
            sum_classes=args.bce_sum,
            pos_weight=args.bce_pos_weight,
        )
    return nn.CrossEntropyLoss(weight, label_smoothing=smoothing)


def _make_loggers(args: argparse.Namespace, folder: Path) -> list[Callable[[dict[str, float]], Any]]:
    loggers: list[Callable[[dict[str, float]], Any]] = []
    if args.log_tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder))

        def log(row: dict[str, float]) -> None:
            for name in row.keys() - {'epoch'}:
                writer.add_scalar(name, row[name], row['epoch'])
            writer.flush()

        loggers.append(log)
    if args.log_wandb:
        import wandb

        # Otherwise the training after a search would log into the search's run.
        wandb.finish()
        run = wandb.init(project='repopt-timm', name=folder.name, dir=str(folder), config=vars(args))
        loggers.append(lambda row: run.log(row, step=row['epoch']))
    return loggers
