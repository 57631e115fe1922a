"""A training run, from arguments to checkpoints."""

import argparse
import csv
import difflib
import io
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import parse_model_name, safe_model_name
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3, distribute_bn, init_distributed_device, random_seed, unwrap_model
from timm.utils.clip_grad import dispatch_clip_grad
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoints.read import read_checkpoint, select_state_dict
from ..datasets import class_names, count_classes
from ..files import write_text
from ..models import ensure_registered
from ..names import PREFIX, ModelName
from ..optim import RepOptAdamW, RepOptSGD, clip_grad_norm_
from ..plot import plot_scales
from ..reparam import kind_of, make_grad_mults
from ..scales import Scales
from ..sources import ScalesSource, default_scales
from .checkpoint import LAST_CHECKPOINT, CheckpointSaver, load_weights, restore, versions
from .data import make_datasets, make_loaders
from .engine import train_one_epoch, validate
from .loggers import make_loggers
from .state import TrainState

__all__ = ['Result', 'prepare_device', 'train']

_logger = logging.getLogger(__name__)

SCALES_FILE = 'scales.safetensors'
_ARCHITECTURE_ARGS = ('strides', 'use_se', 'act_layer')


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


def train(args: argparse.Namespace) -> Result:
    """Runs a training: builds everything from the arguments, trains, evaluates and saves each epoch.

    Args:
        args: What `parse_arguments` returned, after `prepare_device`.

    Returns:
        Where the run is, and what came out.

    Raises:
        ValueError: If arguments do not go together.
        FileNotFoundError: If a file that they name is not there.
    """
    start = time.perf_counter()
    device = torch.device(args.device)
    variant, saved_args = _variant(args.model)
    # What a repository's config says of the architecture goes into the checkpoint, which does not name the repository.
    kept = {name: saved_args[name] for name in _ARCHITECTURE_ARGS if name in saved_args}
    args.model_kwargs = {**kept, **args.model_kwargs}
    args.gp = args.gp or saved_args.get('global_pool')
    _set_defaults(args, variant, device)
    folder, resume_from = _folder(args)
    datasets = make_datasets(args)
    # The same on all ranks: DDP spreads the first one's weights, but not its moving average.
    random_seed(args.seed)
    model = _make_model(args, _scales(args, variant), datasets[0], device)
    optimizer = create_optimizer_v2(model, **{**optimizer_kwargs(args), **args.opt_kwargs})
    clip = _make_clip(args, model, optimizer)
    autocast, scaler = _precision(args, device)
    data_config = resolve_data_config(vars(args), model=model)
    # Where the weights come from is not in the checkpoint, but what they expect is.
    vars(args).update(data_config)
    loaders = make_loaders(args, datasets, data_config, unwrap_model(model).num_classes, device)
    if len(loaders.train) == 0:
        raise ValueError(
            f'The {len(datasets[0])} training images do not fill one batch of {args.batch_size} per process: choose a '
            f'smaller --batch-size.'
        )
    updates = -(-len(loaders.train) // args.grad_accum_steps)
    scheduler, args.total_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates)
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    state = TrainState(_wrap(model, args, device), optimizer, scheduler, ema, scaler)
    if resume_from is not None:
        restore(state, read_checkpoint(resume_from), str(resume_from))
        _logger.info(f'Resuming {resume_from} after epoch {len(state.history)}.')
    if args.distributed:
        _check_epochs(state, folder, args.world_size)
    _replay_schedule(state, updates)
    loss_fn = _make_loss(args).to(device)

    primary = args.rank == 0
    saver = CheckpointSaver(folder, args, args.checkpoint_hist)
    loggers = make_loggers(args, folder) if primary else []
    for epoch in range(len(state.history), args.total_epochs):
        _start_epoch(epoch, loaders, args)
        metrics = train_one_epoch(state, loaders, loss_fn, clip, autocast, epoch, args)
        row = {'epoch': epoch, **{name if name == 'lr' else f'train_{name}': value for name, value in metrics.items()}}
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == args.total_epochs:
            row |= _evaluate(state, loaders.validation, autocast, epoch, args)
        state.history.append(row)
        if primary:
            saver.save(state)
            write_text(folder / 'summary.csv', _csv(state.history))
            for log in loggers:
                log(row)
            values = ', '.join(f'{key} {value:.4g}' for key, value in row.items() if key != 'epoch')
            _logger.info(f'epoch {epoch + 1}/{args.total_epochs}: {values}')
        if state.scheduler is not None:
            state.scheduler.step(epoch + 1, row.get('eval_top1'))
    result = Result(folder, unwrap_model(model if ema is None else ema), state.history, time.perf_counter() - start)
    if primary:
        _save_scales(args, result)
    if args.distributed:
        # What follows on other ranks may read the files of this run.
        torch.distributed.barrier()
    return result


def prepare_device(args: argparse.Namespace) -> None:
    """Joins the processes of a parallel run, if it is one, and sets `device`, `distributed`, `rank`, `world_size`."""
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    args.device = str(init_distributed_device(args))


def _variant(model_name: str) -> tuple[str, dict[str, Any]]:
    """Returns the name in timm's registry, without a tag, and the arguments that a repository keeps for its model."""
    source, name = parse_model_name(model_name)
    saved_args: dict[str, Any] = {}
    if source == 'hf-hub':
        _, name, saved_args = load_model_config_from_hf(name)
    elif source == 'local-dir':
        _, name, saved_args = load_model_config_from_path(name)
    ensure_registered(name)
    variant = name.split('.')[0]
    if not timm.is_model(variant):
        near = difflib.get_close_matches(variant, timm.list_models(), 3)
        raise ValueError(f"timm knows no model '{variant}'." + (f' Did you mean {" or ".join(near)}?' if near else ''))
    return variant, saved_args


def _set_defaults(args: argparse.Namespace, variant: str, device: torch.device) -> None:
    if args.sync_bn and device.type != 'cuda':
        raise ValueError(
            f'--sync-bn works on GPUs, not on {device.type}. Leave it out; --dist-bn averages the statistics.'
        )
    if args.opt is None:
        args.opt = 'repopt_sgd' if _is_target(variant) else 'sgd'
    if args.lr is None:
        args.lr = args.lr_base * _batch_ratio(args)


def _batch_ratio(args: argparse.Namespace) -> float:
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(name in args.opt for name in ('ada', 'lamb')) else 'linear')
    return ratio**0.5 if scale == 'sqrt' else ratio


def _is_target(variant: str) -> bool:
    name = ModelName.parse(variant)
    return name.kind == 'target' and PREFIX in name.architecture


def _folder(args: argparse.Namespace) -> tuple[Path, Path | None]:
    if args.resume and args.resume != 'auto':
        return Path(args.resume).parent, Path(args.resume)
    if args.resume and not args.experiment:
        raise ValueError('--resume without a file needs --experiment, to know which run in --output to continue.')
    experiment = args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}'
    folder = Path(args.output) / experiment
    last = folder / LAST_CHECKPOINT
    if last.exists() and not args.resume:
        raise ValueError(
            f"There is a run in '{folder}' already. Continue it with --resume, or choose another --experiment."
        )
    if args.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    return folder, last if last.exists() else None


def _check_epochs(state: TrainState, folder: Path, world_size: int) -> None:
    epochs = [0] * world_size
    torch.distributed.all_gather_object(epochs, len(state.history))
    if len(set(epochs)) > 1:
        raise ValueError(
            f"The processes would go on after different epochs: {', '.join(map(str, epochs))}, by rank. '{folder}' has "
            f'to be on a disk that all nodes share.'
        )


def _make_model(args: argparse.Namespace, scales: ScalesSource | None, dataset: Any, device: torch.device) -> nn.Module:
    names = class_names(dataset)
    model_args = {**args.model_kwargs, **({} if scales is None else {'scales': scales})}
    model: Any = timm.create_model(
        args.model,
        pretrained=args.pretrained,
        num_classes=args.num_classes or count_classes(dataset),
        in_chans=args.in_chans or (args.input_size[0] if args.input_size else None),
        global_pool=args.gp,
        drop_rate=args.drop,
        **model_args,
    )
    if args.initial_checkpoint:
        load_weights(model, select_state_dict(read_checkpoint(args.initial_checkpoint)), args.initial_checkpoint)
    # Not those of the data that pretrained weights come from.
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': names if len(names) == model.num_classes else None}
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.sync_bn and args.distributed:
        model = timm.layers.convert_sync_batchnorm(model)
    if args.rank == 0:
        count = sum(param.numel() for param in model.parameters())
        carried = getattr(model, 'scales', None)
        told = f', scales {carried.fingerprint[:12]}' if carried is not None else ''
        _logger.info(f'{args.model}: {count / 1e6:.1f} M parameters, {model.num_classes} classes, {args.opt}{told}')
    return model


def _scales(args: argparse.Namespace, variant: str) -> ScalesSource | None:
    if 'scales' in args.model_kwargs:
        raise ValueError('Give scales with --scales instead of --model-kwargs.')
    if args.scales:
        return args.scales
    # The model of a repository brings the scales of its card.
    own = parse_model_name(args.model)[0] is not None
    name = ModelName.parse(variant)
    if name.kind == 'csla' and not own and not args.initial_checkpoint and not args.resume:
        raise ValueError(
            f"{variant} needs --scales: a file, 'hf-hub:user/repo' or 'initial'. Search some with {name.of_kind('hs')}."
        )
    if _is_target(variant) and not own and args.opt.removeprefix('lookahead_').startswith('repopt'):
        return default_scales(args.model)
    return None


def _wrap(model: Any, args: argparse.Namespace, device: torch.device) -> nn.Module:
    if args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile)
    if args.distributed:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None)
    return model


def _make_clip(args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable | None:
    if args.clip_grad is None:
        return None
    base = getattr(optimizer, '_base_optimizer', optimizer)
    parameters = list(model.parameters())
    if not isinstance(base, (RepOptSGD, RepOptAdamW)):
        return partial(dispatch_clip_grad, parameters, args.clip_grad, mode=args.clip_mode)
    if args.clip_mode != 'norm':
        raise ValueError(
            f'--clip-mode {args.clip_mode} breaks the equivalence with the CSLA network. With {args.opt} use '
            f"--clip-mode norm, which measures that network's norm."
        )
    return partial(clip_grad_norm_, parameters, args.clip_grad, make_grad_mults(model))


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


def _replay_schedule(state: TrainState, updates_per_epoch: int) -> None:
    # The schedule is a function of epochs and metrics, so going through them again restores it.
    if state.scheduler is None:
        return
    for row in state.history:
        state.scheduler.step_update((row['epoch'] + 1) * updates_per_epoch)
        state.scheduler.step(row['epoch'] + 1, row.get('eval_top1'))


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


def _evaluate(
    state: TrainState, loader: Any, autocast: Callable, epoch: int, args: argparse.Namespace
) -> dict[str, float]:
    if args.distributed and args.dist_bn:
        distribute_bn(state.model, args.world_size, args.dist_bn == 'reduce')
    model = state.model
    if state.ema is not None:
        model = state.ema.module
        if args.distributed and args.dist_bn:
            distribute_bn(model, args.world_size, args.dist_bn == 'reduce')
    metrics = validate(model, loader, autocast, f'epoch {epoch + 1}/{args.total_epochs} validation', args)
    return {f'eval_{name}': value for name, value in metrics.items()}


def _csv(history: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in history for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(history)
    return buffer.getvalue()


def _save_scales(args: argparse.Namespace, result: Result) -> None:
    if kind_of(result.model) != 'hs':
        return
    last = result.history[-1]
    provenance = {
        'method': 'hyper-search',
        'dataset': args.dataset or Path(args.data_dir).name,
        'epochs': len(result.history),
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
    if args.clip_grad is not None:
        provenance['clip_grad'] = args.clip_grad
    scales = Scales.from_model(result.model, provenance)
    scales.save(result.folder / SCALES_FILE)
    _logger.info(f'Scales {scales.fingerprint[:12]} are in {result.folder / SCALES_FILE}')
    try:
        plot_scales(scales, result.folder / 'scales.png', scales.title)
    except ImportError as error:
        _logger.warning(f'No picture of the scales: {error}')
