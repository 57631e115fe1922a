"""The model of a run: its name, its scales, its weights, and what it is wrapped in."""

import argparse
import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
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
from ..models import resolve_model
from ..names import PREFIX, ModelName
from ..sources import ScalesSource, default_scales
from ..trained_scales import named_scales, trained_with
from ..weights_origin import forget_origin, merged_from, restore_origin
from .run_checkpoints import load_weights
from .run_folder import ARGUMENTS_FILE, saved_argument

__all__ = ['choose_scales', 'find_variant', 'is_target', 'make_model', 'scales_of_run', 'wrap']

_logger = logging.getLogger(__name__)


def find_variant(model_name: str) -> tuple[str, dict[str, Any]]:
    """Returns the name in timm's registry, without a tag, and the arguments that a repository keeps for its model."""
    with explaining(f'--model {model_name} has no config.json that timm can read'):
        name, saved_args = resolve_model(model_name)
    variant = name.split('.')[0]
    if not timm.is_model(variant):
        near = difflib.get_close_matches(variant, timm.list_models(), 3)
        raise ValueError(f"timm knows no model '{variant}'." + (f' Did you mean {" or ".join(near)}?' if near else ''))
    return variant, saved_args


def is_target(variant: str) -> bool:
    """Returns whether a registered name is that of a plain model of this package."""
    name = ModelName.parse(variant)
    return name.kind == 'target' and PREFIX in name.architecture


def choose_scales(args: argparse.Namespace, variant: str, folder: Path) -> None:
    """Sets `--scales` of a target that was given none, and says so.

    A run that is resumed keeps what it had, `--initial-checkpoint` brings what it was trained with, pretrained weights
    what ships with them; anything else starts from the unsearched values.

    Args:
        args: Arguments of the run.
        variant: Name in timm's registry.
        folder: Folder of the run.

    Raises:
        ValueError: If the initial checkpoint was trained with scales that it does not name.
    """
    if args.scales or not is_target(variant) or not _multiplies(args):
        return
    if args.resume and (folder / ARGUMENTS_FILE).is_file():
        args.scales = saved_argument(folder, 'scales', str)
        return
    if args.initial_checkpoint:
        with explaining(f"'{args.initial_checkpoint}' does not hold weights"):
            args.scales = named_scales(read_checkpoint(args.initial_checkpoint), args.initial_checkpoint)
    elif not args.pretrained and '.' not in args.model and parse_model_name(args.model)[0] is None:
        args.scales = 'initial'
    if args.scales and args.rank == 0:
        what = 'the unsearched values, ' if args.scales == 'initial' else ''
        _logger.info(f'Without --scales this run uses {what}--scales {args.scales}.')


def _multiplies(args: argparse.Namespace) -> bool:
    return args.opt.removeprefix('lookahead_').startswith('repopt')


def scales_of_run(args: argparse.Namespace, variant: str) -> ScalesSource | None:
    """Returns the scales that a run creates its model with: `--scales`, or the shipped ones of its pretrained weights.

    Raises:
        ValueError: If a CSLA model has none, or a target with a RepOptimizer that starts from weights.
    """
    if args.scales:
        return args.scales
    # The model of a repository brings the scales of its card.
    own = parse_model_name(args.model)[0] is not None
    name = ModelName.parse(variant)
    if name.kind == 'csla' and not own and not args.initial_checkpoint and not args.resume:
        raise ValueError(
            f"{variant} needs --scales: a file, 'hf-hub:user/repo' or 'initial'. Search some with {name.of_kind('hs')}."
        )
    if is_target(variant) and not own and _multiplies(args):
        return default_scales(args.model)
    return None


def make_model(args: argparse.Namespace, scales: ScalesSource | None, dataset: Any, device: torch.device) -> nn.Module:
    """Creates the model of a run on its device, with its initial weights.

    Args:
        args: Arguments of the run.
        scales: Scales of the model.
        dataset: The training images, which may name their classes.
        device: Where to.

    Raises:
        ValueError: If `--initial-checkpoint` does not hold weights of the model.
    """
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
    if not args.pretrained:
        forget_origin(model)
    elif (original := merged_from(model)) and ':' not in args.model and args.rank == 0:
        _logger.info(
            f'{args.model} has the weights of {original}, merged without images: its BatchNorm variances are '
            f'estimates, and the first steps renormalize. `repopt-timm convert-checkpoint --data` measures them.'
        )
    if args.initial_checkpoint:
        with explaining(f"'{args.initial_checkpoint}' does not hold weights"):
            checkpoint = read_checkpoint(args.initial_checkpoint)
            load_weights(model, select_state_dict(checkpoint), args.initial_checkpoint)
            restore_origin(model, checkpoint.get('origin'))
            _note_other_scales(model, checkpoint, args)
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
        count = count_parameters(model)
        carried = getattr(model, 'scales', None)
        suffix = f', scales {carried.fingerprint[:12]}' if carried is not None else ''
        _logger.info(f'{args.model}: {count / 1e6:.1f} M parameters, {model.num_classes} classes, {args.opt}{suffix}')
    return model


def _note_other_scales(model: Any, checkpoint: Mapping[str, Any], args: argparse.Namespace) -> None:
    before, carried = trained_with(checkpoint), getattr(model, 'scales', None)
    if args.rank == 0 and before and carried is not None and carried.fingerprint not in before:
        _logger.warning(
            f"'{args.initial_checkpoint}' was trained with the scales {min(before)[:12]}, this run multiplies with "
            f'{carried.fingerprint[:12]}.'
        )


def wrap(model: Any, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """Compiles a model, and puts it into DistributedDataParallel, if the run does so."""
    if args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile)
    if args.distributed:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None)
    return model
