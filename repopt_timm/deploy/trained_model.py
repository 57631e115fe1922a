"""Loads any timm model in its deployed form: branches merged, scales removed, BatchNorm folded."""

import os
from pathlib import Path
from typing import Any

import timm
from timm.layers import ConvNormAct
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..checkpoint_model import model_from_checkpoint
from ..errors import explaining, reason_of
from ..models import resolve_model, to_plain
from ..reparam import attach_scales, kind_of
from ..sources import ScalesSource, load_scales
from ..train.run_folder import BEST_CHECKPOINT, LAST_CHECKPOINT

__all__ = ['deployed', 'load_model', 'load_trained']


def load_model(source: str | os.PathLike) -> nn.Module:
    """Loads a trained model, ready for deployment.

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
    return deployed(load_trained(source))


def load_trained(source: str | os.PathLike, scales: ScalesSource | None = None, need_scales: bool = False) -> nn.Module:
    """Loads a trained model as it was trained; `_hs` and `_csla` ones as their plain twin.

    Args:
        source: See `load_model`.
        scales: Scales for its convolutions to carry, where its source does not bring them.
        need_scales: Refuse the checkpoint of a run with scales if they are not given.

    Raises:
        FileNotFoundError: If there is no such checkpoint, folder or source of scales.
        OSError: If weights cannot be downloaded.
        ValueError: If timm does not know the model, has no weights for it, or weights or scales do not fit.
    """
    path = Path(source)
    if path.suffix == '.onnx':
        raise ValueError(f"'{source}' is an ONNX file already; name the checkpoint that it comes from.")
    best, last = path / BEST_CHECKPOINT, path / LAST_CHECKPOINT
    if last.is_file():
        path = best if best.is_file() else last
    if path.is_dir():
        model = _create(f'local-dir:{path}', pretrained=True)
    elif path.is_file() or path.suffix in ('.tar', '.pth', '.pt', '.safetensors'):
        model = model_from_checkpoint(path, scales, need_scales)
    elif path.is_absolute() or ('/' in str(source) and ':' not in str(source)):
        raise FileNotFoundError(f"There is no folder '{source}'. A repository on the Hub is named hf-hub:user/name.")
    else:
        model = _create(os.fspath(source), pretrained=True)
    if kind_of(model) != 'target':
        return to_plain(model)
    if scales is not None and not path.is_file():
        attach_scales(model, load_scales(scales, model))
    return model


def deployed(model: nn.Module) -> nn.Module:
    """Merges branches and folds BatchNorm, in place; the model gets into evaluation mode."""
    model = reparameterize_model(model.eval())
    _fold_batchnorm(model)
    return model.float().requires_grad_(False)


def _create(name: str, **kwargs: Any) -> nn.Module:
    try:
        with explaining(f"'{name}' cannot be made"):
            resolve_model(name)
            return timm.create_model(name, **kwargs)
    except OSError as error:
        if name.startswith('local-dir:'):
            raise
        # Those of the Hub name neither the model nor what to do, and some are ValueErrors too.
        raise OSError(
            f"'{name}': its weights are not in the cache, and cannot be downloaded: {reason_of(error)}. Check the "
            f'network, or name a checkpoint or a folder.'
        ) from None
    except ValueError as error:
        raise ValueError(f'{str(error).rstrip(".")}. Name a checkpoint, a folder or a model with weights.') from None


def _fold_batchnorm(model: nn.Module) -> None:
    """Folds it where a block's class guarantees that it follows the convolution; the exporter covers other graphs."""
    for block in model.modules():
        if isinstance(block, ConvNormAct):
            conv, norm = block.conv, block.bn
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                block.conv = fuse_conv_bn_eval(conv, norm)
                block.bn = getattr(norm, 'act', nn.Identity())
