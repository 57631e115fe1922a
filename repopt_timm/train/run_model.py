"""The model of a run: its scales, its weights, and what it is wrapped in."""

import argparse
import logging
from typing import Any

import timm
import torch
from timm.models import parse_model_name
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoints.read import read_checkpoint, select_state_dict
from ..datasets import class_names, count_classes
from ..errors import explaining
from ..model_size import count_parameters
from ..reparam import carried_scales, kind_of, multi_branch_blocks
from ..sources import ScalesSource, default_scales
from ..trained_scales import trained_with
from ..weights_origin import merged_from, restore_origin
from .resolution import is_target

_logger = logging.getLogger(__name__)


def scales_of_run(args: argparse.Namespace) -> ScalesSource | None:
    """Returns the scales that a run creates its model with: `--scales`, or the scales of its pretrained weights."""
    if args.scales:
        return args.scales
    # The model of a repository brings the scales of its card.
    if is_target(args.variant) and parse_model_name(args.model)[0] is None and 'repopt' in args.opt:
        return default_scales(args.model)
    return None


def make_model(args: argparse.Namespace, scales: ScalesSource | None, dataset: Any, device: torch.device) -> nn.Module:
    """Creates the model of a run on its device, with its initial weights and the names of the dataset's classes."""
    names = class_names(dataset)
    model: Any = timm.create_model(
        args.model,
        pretrained=args.pretrained,
        num_classes=args.num_classes or count_classes(dataset),
        in_chans=args.in_chans or (args.input_size[0] if args.input_size else None),
        global_pool=args.gp,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        **{**args.model_kwargs, **({} if scales is None else {'scales': scales})},
    )
    if not args.pretrained:
        restore_origin(model, None)
    elif (original := merged_from(model)) and ':' not in args.model:
        _logger.info(
            f'{args.model} has the weights of {original}, merged without images: its BatchNorm variances are '
            f'estimates, and the first steps renormalize. `repopt-timm convert-checkpoint --data` measures them.'
        )
    if args.init == 'dirac':
        if kind_of(model) != 'target' or any(multi_branch_blocks(model)):
            raise ValueError(f'--init {args.init} is a start for plain networks; with branches use --scales identity.')
        for conv in model.modules():
            if isinstance(conv, nn.Conv2d) and conv.in_channels == conv.out_channels and conv.stride == (1, 1):
                nn.init.dirac_(conv.weight, conv.groups)
    if args.initial_checkpoint:
        with explaining(f"'{args.initial_checkpoint}' does not hold the weights of this model"):
            _load_weights(model, args.initial_checkpoint)
    # Pretrained weights name the classes of their own data.
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': names if len(names) == model.num_classes else None}
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.sync_bn and args.distributed:
        model = timm.layers.convert_sync_batchnorm(model)
    count = count_parameters(model) / 1e6
    _logger.info(f'{args.model}: {count:.1f} M parameters, {model.num_classes} classes, {args.opt}')
    return model


def _load_weights(model: Any, path: str) -> None:
    """Loads weights; a classifier of other classes stays as it is, as with timm's `--pretrained`."""
    checkpoint = read_checkpoint(path)
    weights, own = select_state_dict(checkpoint), model.state_dict()
    classifiers = model.pretrained_cfg.get('classifier') or ()
    heads = tuple(f'{name}.' for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    others = {
        name: own[name]
        for name in weights.keys() & own
        if name.startswith(heads) and weights[name].shape != own[name].shape
    }
    model.load_state_dict({**weights, **others})
    restore_origin(model, checkpoint.get('origin'))
    if others:
        _logger.info(
            f"'{path}' has other classes than the {model.num_classes} of this run: all weights are loaded but "
            f'{", ".join(sorted(others))}.'
        )
    before, carried = trained_with(checkpoint), {each.scales.fingerprint for each in carried_scales(model).values()}
    if before and carried and before != carried:
        _logger.warning(
            f"'{path}' was trained with the scales {min(before)[:12]}, this run multiplies with {min(carried)[:12]}."
        )


def wrap(model: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """Puts a model into DistributedDataParallel and compiles it, in this order, if the run does so."""
    if args.distributed:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None)
    if args.torchcompile:
        with explaining(f'--torchcompile {args.torchcompile}'):
            model = torch.compile(model, backend=args.torchcompile)  # type: ignore[assignment]
    return model
