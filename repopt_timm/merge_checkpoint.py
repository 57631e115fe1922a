"""Trained multi-branch networks as plain ones: timm's by name, the user's own and the authors' from checkpoints."""

import os
from pathlib import Path
from typing import Any

import timm
from torch import nn

from .architectures import ARCHITECTURES
from .blocks import implied_scales, plain_twin, recalibrate
from .checkpoint_model import model_from_checkpoint
from .checkpoints.read import check_weights, checkpoint_of, read_checkpoint
from .datasets import open_evaluation
from .deploy.classifier import preprocessing
from .models import ensure_registered, resolve_model, take_name
from .models.reference_weights import model_from_reference
from .names import PREFIX, ModelName
from .reparam import multi_branch_blocks, prepare
from .weights_origin import note_merged


def merge_trained(
    source: str, model_name: str = '', data: str | os.PathLike | None = None, implied: bool = False
) -> nn.Module:
    """Makes the plain network of a trained multi-branch one, under our name, in evaluation mode.

    `source` is a checkpoint of a run, a file of tensors or of the authors, or a name of `timm.create_model`. With
    `data` added BatchNorms are measured on images. A target of the authors, which is plain, stays as it is.
    """
    # A mistyped 'mobileone_s0.pth' is not a tag of mobileone_s0.
    tagged = timm.is_model(source.split('.')[0]) and Path(source).suffix not in ('.pth', '.pt', '.tar', '.safetensors')
    is_file = checkpoint_of(source).is_file() or not (':' in source or tagged)
    checkpoint = read_checkpoint(source) if is_file else {}
    if model_name:
        checkpoint['arch'] = model_name
    of_authors = is_file and not isinstance(checkpoint.get('arch'), str)
    original: Any
    if of_authors:
        original = model_from_reference(checkpoint, source)
    elif is_file:
        original = model_from_checkpoint(source, need_scales=False, checkpoint=checkpoint)
    else:
        resolve_model(source)
        original = timm.create_model(source, pretrained=True).eval()
        check_weights(original.state_dict(), source)
    cfg = original.pretrained_cfg
    if not any(multi_branch_blocks(original)):
        if of_authors and data is None and not implied:
            return original
        advice = 'Leave out --data and --scales implied.' if of_authors else 'Write it with repopt-timm save.'
        raise ValueError(f'{source}: {cfg["architecture"]} has no branches to merge. {advice}')
    plain: Any = plain_twin(original, weights=True)
    name = _plain_name(cfg['architecture'])
    take_name(plain, name)
    # The note is published: no path of the machine.
    note_merged(plain, cfg['architecture'] if is_file or source.startswith('local-dir:') else source)
    if implied:
        prepare(plain, implied_scales(original).renamed(name.network), init=False)
    if data is not None:
        folder = open_evaluation(data, 'train', preprocessing(model=plain))
        recalibrate(plain, folder.batches(folder.sample(2048, seed=0), 64, 'BatchNorm'))
    return plain


def _plain_name(original: str) -> ModelName:
    name = ModelName.parse(original)
    if name.kind == 'branches':
        return ModelName(name.architecture)
    own = original.replace('repvgg_', 'repopt_vgg_')
    if own in ARCHITECTURES and not ARCHITECTURES[own].use_se:
        return ModelName(own)
    ensure_registered(PREFIX + original)
    return ModelName(PREFIX + original)
