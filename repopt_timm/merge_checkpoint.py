"""Trained multi-branch networks as plain ones: timm's by name, and the user's own from checkpoints."""

import os
from pathlib import Path
from typing import Any

import timm
from timm.models import parse_model_name
from torch import nn

from .architectures import ARCHITECTURES
from .blocks import implied_scales, plain_twin, recalibrate
from .checkpoint_model import model_from_checkpoint
from .checkpoints.read import read_checkpoint
from .deploy.classifier import preprocessing
from .deploy.image_folder import ImageFolder
from .models import ensure_registered, resolve_model
from .models.timm_twins import plain_first_conv
from .names import PREFIX, ModelName
from .reparam import multi_branch_blocks, prepare
from .weights_origin import note_merged

__all__ = ['is_multi_branch_source', 'merge_trained']

_BATCH = 64


def is_multi_branch_source(source: str) -> bool:
    """Returns whether `source` is not a bare file: a checkpoint that names its model, or a name that timm knows."""
    if Path(source).is_file():
        return isinstance(read_checkpoint(source).get('arch'), str)
    kind, name = parse_model_name(source)
    return kind is not None or timm.is_model(name.split('.')[0])


def merge_trained(
    source: str,
    model_name: str = '',
    data: str | os.PathLike | None = None,
    images: int = 2048,
    implied: bool = False,
) -> nn.Module:
    """Makes the plain network of a trained multi-branch one, under our name.

    Args:
        source: Checkpoint of a run, file of tensors, or what `timm.create_model` takes, such as
            `mobileone_s0.apple_in1k`.
        model_name: timm's name of the network, for a file that does not state it.
        data: Image folder to measure the statistics of added BatchNorms on; its training split if it has one.
            Defaults to estimates from the branches.
        images: Number of images to measure on.
        implied: Let the network carry the scales that the branches imply.

    Returns:
        The network in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If the network has no branches, or cannot become plain.
    """
    if Path(source).is_file():
        original: Any = model_from_checkpoint(source, need_scales=False, architecture=model_name)
    else:
        resolve_model(source)
        original = timm.create_model(source, pretrained=True).eval()
    cfg = original.pretrained_cfg
    if not any(multi_branch_blocks(original)):
        raise ValueError(f'{source}: {cfg["architecture"]} has no branches to merge. Write it with repopt-timm save.')
    plain: Any = plain_twin(original, weights=True)
    name = _plain_name(cfg['architecture'])
    plain.architecture = name.network
    first_conv = plain_first_conv(plain, cfg.get('first_conv'))
    plain.pretrained_cfg = plain.default_cfg = {**cfg, 'architecture': name.architecture, 'first_conv': first_conv}
    note_merged(plain, cfg['architecture'] if Path(source).is_file() else source)
    if hasattr(plain, '_traits'):
        plain._traits = {**plain._traits, 'first_conv': first_conv}
    if implied:
        prepare(plain, implied_scales(original).renamed(name.network), init=False)
    if data is not None:
        folder = ImageFolder(data, 'train', preprocessing(model=plain))
        recalibrate(plain, folder.batches(folder.sample(images, seed=0), _BATCH, 'BatchNorm'))
    return plain


def _plain_name(original: str) -> ModelName:
    name = ModelName.parse(original)
    if name.kind == 'branches':
        return ModelName(name.architecture)
    own = original.replace('repvgg_', 'repopt_vgg_')
    if own != original and own in ARCHITECTURES and not ARCHITECTURES[own].use_se:
        return ModelName(own)
    ensure_registered(PREFIX + original)
    return ModelName(PREFIX + original)
