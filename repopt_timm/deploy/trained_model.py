"""Loads any timm model in its deployed form: branches merged, scales removed, BatchNorm folded."""

import os
from pathlib import Path

import timm
from timm.layers import ConvNormAct
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..checkpoint_model import model_from_checkpoint
from ..errors import explaining, reason_of
from ..models import resolve_model, to_plain
from ..reparam import kind_of
from ..train.run_folder import BEST_CHECKPOINT, LAST_CHECKPOINT

__all__ = ['load_model', 'load_trained']


def load_model(source: str | os.PathLike) -> nn.Module:
    """Loads a trained model, ready for inference in PyTorch.

    Multi-branch models become plain: `_hs`, `_csla`, and whatever timm can reparameterize, such as `repvgg_*`.

    Args:
        source: A checkpoint or folder of a training run, a folder in timm's format, or a name for `timm.create_model`.

    Returns:
        The model, in evaluation mode on the CPU, with its data configuration in `pretrained_cfg`.

    Raises:
        FileNotFoundError: If there is no such checkpoint or folder.
        OSError: If weights cannot be downloaded.
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
    """Loads a trained model with its BatchNorm and the branches of others' models; `_hs` and `_csla` ones as targets.

    Args:
        source: See `load_model`, which raises the same.
    """
    path = Path(source)
    if path.suffix == '.onnx':
        raise ValueError(f"'{source}' is an ONNX file already; name the checkpoint that it comes from.")
    best, last = path / BEST_CHECKPOINT, path / LAST_CHECKPOINT
    if last.is_file():
        path = best if best.is_file() else last
    if path.is_dir():
        model = _create(f'local-dir:{path}')
    elif path.is_file() or path.suffix in ('.tar', '.pth', '.pt', '.safetensors'):
        model = model_from_checkpoint(path, need_scales=False)
    elif path.is_absolute() or ('/' in str(source) and ':' not in str(source)):
        raise FileNotFoundError(f"There is no folder '{source}'. A repository on the Hub is named hf-hub:user/name.")
    else:
        model = _create(os.fspath(source))
    if kind_of(model) != 'target':
        model = to_plain(model)
    return model.eval().float().requires_grad_(False)


def _create(name: str) -> nn.Module:
    try:
        with explaining(f"'{name}' cannot be made"):
            resolve_model(name)
            return timm.create_model(name, pretrained=True)
    except OSError as error:
        if name.startswith('local-dir:'):
            raise
        # Those of the Hub name neither the model nor what to do, and some are ValueErrors too.
        raise OSError(
            f"'{name}': its weights are not in the cache, and cannot be downloaded: {reason_of(error)}. Check the "
            f'network, or name a checkpoint or a folder.'
        ) from None
