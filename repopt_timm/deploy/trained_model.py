"""Loads any timm model in its deployed form: branches merged, scales removed, BatchNorm folded."""

import os
from pathlib import Path

import timm
from timm.layers import ConvNormAct
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..checkpoint_model import model_from_checkpoint
from ..errors import explaining
from ..models import resolve_model, to_plain
from ..reparam import kind_of
from ..train.run_folder import BEST_CHECKPOINT, LAST_CHECKPOINT


def load_model(source: str | os.PathLike) -> nn.Module:
    """Loads a trained model, ready for inference in PyTorch.

    Multi-branch models become plain: `_hs`, `_csla`, and whatever timm can reparameterize, such as `repvgg_*`.

    Args:
        source: A checkpoint or folder of a training run, a folder in timm's format, or a name for `timm.create_model`.

    Returns:
        The model, in evaluation mode on the CPU, with its data configuration in `pretrained_cfg`.

    Raises:
        OSError: If there is no such checkpoint or folder, or weights cannot be downloaded.
        ValueError: If timm does not know the model, has no weights for it, or the weights do not fit.
    """
    model = reparameterize_model(load_trained(source))
    # ONNX files need none of this, as PyTorch's exporter folds; PyTorch itself is slower with BatchNorm.
    for block in model.modules():
        if isinstance(block, ConvNormAct) and isinstance(block.conv, nn.Conv2d):
            norm = block.bn
            if isinstance(norm, nn.BatchNorm2d):
                block.conv, block.bn = fuse_conv_bn_eval(block.conv, norm), getattr(norm, 'act', nn.Identity())
    return model


def load_trained(source: str | os.PathLike) -> nn.Module:
    """Loads a model with its BatchNorm and the branches of others' models; `_hs` and `_csla` ones as targets."""
    path = Path(source)
    best, last = path / BEST_CHECKPOINT, path / LAST_CHECKPOINT
    if last.is_file():
        path = best if best.is_file() else last
    if path.is_file() or path.suffix in ('.tar', '.pth', '.pt', '.safetensors'):
        model = model_from_checkpoint(path, need_scales=False)
    else:
        name = f'local-dir:{path}' if path.is_dir() else os.fspath(source)
        with explaining(f"'{name}' cannot be made"):
            resolve_model(name)
            model = timm.create_model(name, pretrained=True)
    if kind_of(model) != 'target':
        model = to_plain(model)
    return model.eval().float().requires_grad_(False)
