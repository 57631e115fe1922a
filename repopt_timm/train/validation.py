"""Checks, before anything is written, of what timm would get wrong silently and of what would fail after hours."""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from timm.models import parse_model_name
from timm.optim import list_optimizers
from torch.utils.data import IterableDataset

from ..checkpoints.read import checkpoint_of
from ..console import did_you_mean
from ..datasets import color_mode
from ..errors import explaining
from ..names import PREFIX, ModelName
from ..reparam import carried_scales
from ..reparam.modules import pair
from ..reparam.prior import carried_priors
from ..sources import UNSEARCHED
from .residual import residual_convs

_logger = logging.getLogger(__name__)

_REPOPT = {'repopt_sgd', 'repopt_adamw'}
_PREFIXES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')


def check_arguments(args: argparse.Namespace) -> None:
    """Checks all that can be known without data, model or network."""
    if not args.data_dir and not args.dataset:
        raise ValueError('No data: give the path of an image folder, or --dataset, or try -c quickstart.')
    for path in (args.initial_checkpoint and checkpoint_of(args.initial_checkpoint), args.resume):
        if path and path != 'auto' and not Path(path).is_file():
            raise FileNotFoundError(f"There is no checkpoint file '{path}'.")
    if not args.output or Path(args.experiment).is_absolute() or '..' in Path(args.experiment).parts:
        raise ValueError(
            f"--output is '{args.output}' and --experiment '{args.experiment}', expected a name inside it."
        )
    _check_images_read(args)
    if args.opt is not None:
        _check_optimizer(args)
    if args.search_first:
        _check_search(args)
    source, name = parse_model_name(args.model)
    kind = ModelName.parse(name).kind
    if source is None and args.scales and (kind == 'branches' or (kind == 'hs' and args.scales not in UNSEARCHED)):
        raise ValueError(
            f'--model {args.model} does not take --scales {args.scales}: it has branches instead, or searches scales '
            f"from 'initial' or 'identity'."
        )
    if 'scales' in args.model_kwargs:
        raise ValueError('Give scales with --scales instead of --model-kwargs.')
    if args.init and (args.pretrained or args.initial_checkpoint):
        raise ValueError(f'--init {args.init} is a start for networks without weights of their own: remove it.')
    if args.class_weights and args.bce_loss:
        raise ValueError('--class-weights weighs images, and --bce-loss weighs classes: use --sampler balanced.')
    if args.sched == 'plateau' and args.sched_on_updates:
        raise ValueError('--sched plateau goes by epochs, not by --sched-on-updates, which a trial always sets.')
    if args.lr is not None and args.min_lr > args.lr:
        raise ValueError(f'--min-lr is {args.min_lr}, above --lr, which is {args.lr}: lower --min-lr.')
    if args.decay_milestones != sorted(set(args.decay_milestones)):
        raise ValueError(f'--decay-milestones are {args.decay_milestones}, expected rising epochs.')
    if args.sync_bn and args.device and not args.device.startswith('cuda'):
        raise ValueError(f'--sync-bn works on GPUs, not on {args.device}. Remove it; --dist-bn averages statistics.')
    if (args.mixup > 0 or args.cutmix > 0) and args.batch_size % 2:
        raise ValueError(f'--mixup and --cutmix mix pairs of images: --batch-size {args.batch_size} is odd.')
    # timm passes over an option without a number.
    if args.aa and not all(any(map(str.isdigit, option)) for option in args.aa.split('-')[1:]):
        raise ValueError(f"--aa is '{args.aa}', expected a number in each option, such as rand-m9-mstd0.5.")


def _check_images_read(args: argparse.Namespace) -> None:
    prefix, _, name = args.dataset.partition('/')
    if args.dataset not in ('', 'digits') and not (name and prefix.lower() in _PREFIXES):
        # timm would read a folder of images.
        names = ', '.join(f'{each}/NAME' for each in _PREFIXES)
        raise ValueError(f"--dataset is '{args.dataset}', expected digits, {names}, or none for a folder of images.")
    if prefix.lower() == 'torch' and not args.data_dir:
        raise ValueError(f'--dataset {args.dataset} needs the folder of its data: add --data-dir DIR.')
    size = args.input_size
    if size and args.img_size and size[1:] != [args.img_size] * 2:
        raise ValueError(
            f'--img-size is {args.img_size}, and --input-size, which a config may have set, is {size}: give '
            f'--input-size {size[0]} {args.img_size} {args.img_size}.'
        )
    if size and args.in_chans not in (None, size[0]):
        raise ValueError(f'--in-chans is {args.in_chans} and --input-size {size}, expected the same channels.')
    channels = args.in_chans or (size[0] if size else 3)
    color_mode(channels)
    for name in ('mean', 'std'):
        if len(vars(args)[name] or [0]) not in (1, channels):
            raise ValueError(f'--{name} has {len(vars(args)[name])} values, expected 1 or {channels}.')


def _check_optimizer(args: argparse.Namespace) -> None:
    name = args.opt.removeprefix('lookahead_')
    # The factory knows two names for each of ours; one is enough. timm ignores an unknown prefix of a name.
    known = {*map(str, list_optimizers()), *_REPOPT} - {each.replace('_', '') for each in _REPOPT}
    if name not in known:
        raise ValueError(f"--opt '{args.opt}' is unknown.{did_you_mean(name, known)}")
    if name in _REPOPT and args.clip_grad is not None and args.clip_mode != 'norm':
        raise ValueError(
            f'--clip-mode {args.clip_mode} breaks the equivalence with the CSLA network. With {args.opt} use '
            f"--clip-mode norm, which measures that network's norm."
        )
    if name in ('sgd', 'nesterov', 'repopt_sgd') and not args.momentum and args.opt_kwargs.get('nesterov', True):
        raise ValueError('--momentum 0 leaves nothing to Nesterov: add --opt-kwargs nesterov=false.')


def _check_search(args: argparse.Namespace) -> None:
    if args.scales:
        raise ValueError('--search-first searches the scales itself, so it does not go with --scales.')
    name = ModelName.parse(args.model)
    if parse_model_name(args.model)[0] is not None or name.kind != 'target' or PREFIX not in name.architecture:
        raise ValueError(f"--search-first needs the name of a target, such as repopt_vgg_a0, not '{args.model}'.")
    if args.resume and args.resume != 'auto':
        raise ValueError('Continue --search-first with --resume and no file: it finds its own checkpoints.')
    if not any(each in (args.opt or 'sgd') for each in ('sgd', 'momentum', 'nesterov')):
        raise ValueError(
            f'The search uses SGD, which the learning rate of {args.opt} does not suit: train {args.model}_hs first, '
            f'and then --model {args.model} with the --scales that it found.'
        )


def check_device_name(name: str | None) -> None:
    """Checks that a device exists and has the float64 that the loop sums in."""
    if name is not None:
        with explaining(f"--device is '{name}', which has no float64 here. Try --device cpu"):
            torch.ones(1, dtype=torch.float64, device=name).item()


@torch.no_grad()
def check_model(
    model: torch.nn.Module, datasets: tuple[Any, Any], input_size: tuple[int, ...], device: torch.device
) -> None:
    """Passes the first training and the first validation image through a model, or zeros if the data are streamed."""
    size = ' x '.join(map(str, input_size))
    for dataset, split in zip(datasets, ('training', 'validation')):
        with explaining(f'The model does not run on a {split} image of {size} (--in-chans, --input-size, --img-size)'):
            streamed = isinstance(dataset, IterableDataset)
            image = torch.zeros(input_size) if streamed else torch.as_tensor(dataset[0][0]).float()
            model.eval()(image[None].to(device))


def warn_of_residuals(model: torch.nn.Module, input_size: tuple[int, ...], device: torch.device) -> None:
    """Warns if convolutions in residual blocks get scales that come from no multi-branch block of the network."""
    ruled = {name for name, each in carried_scales(model).items() if each.initialized} - set(carried_priors(model))
    if not ruled:
        return
    found = ruled.intersection(residual_convs(model.eval(), torch.zeros(1, *input_size, device=device)))
    if found:
        _logger.warning(
            f'{len(found)} of {len(ruled)} convolutions with scales lie in residual blocks. RepOptSGD made a narrow '
            f'ResNet-18 worse by 1.5 points: train this network with --opt sgd too, or compare them by `repopt-timm '
            f'trial`.'
        )


def check_layout(
    model: torch.nn.Module, input_size: tuple[int, ...], device: torch.device, dtype: torch.dtype | None
) -> None:
    """Refuses channels_last where torch 2.14 writes past its memory: in the backward pass of a strided 1x1 stem.

    In float32 it does so from 8 px on a processor without AVX-512; bfloat16 was safe up to 64 px on each processor that
    was tried. `dtype` is the lower precision of the forward pass, if any.
    """
    if device.type != 'cpu' or (dtype is torch.bfloat16 and max(input_size[1:]) <= 64):
        return
    for name, conv in model.named_modules():
        if not isinstance(conv, torch.nn.Conv2d) or conv.in_channels >= 16:
            continue
        if tuple(conv.kernel_size) == (1, 1) and max(pair(conv.stride)) > 1:
            raise ValueError(
                f"--channels-last: torch corrupts memory on a CPU as it trains '{name}', a strided 1x1 convolution of "
                f'{conv.in_channels} channels. Add --no-channels-last, train on a GPU, or on images of up to 64 px use '
                f'--amp --amp-dtype bfloat16.'
            )
