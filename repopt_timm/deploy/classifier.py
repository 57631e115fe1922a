"""Loads what is deployed, and puts a PyTorch model or an ONNX one behind one call."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from timm.layers import ConvNormAct
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..checkpoint_model import model_from_checkpoint
from ..checkpoints.read import checkpoint_of
from ..datasets import Images, core_count
from ..errors import explaining, reason_of
from ..models import resolve_model
from ..reparam import kind_of, to_plain
from ..reporting import lacks_vnni
from .onnx_graph import image_input
from .runtime import load_onnx, open_session, require

_logger = logging.getLogger(__name__)

OVERFLOW = (
    'This processor has no VNNI: ONNX Runtime adds up 8-bit products in 16 bits here, and they can overflow. Quantize '
    'with --reduce-range for such processors.'
)


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
        if not isinstance(block, ConvNormAct):
            continue
        conv, norm = block.conv, block.bn
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            block.conv, block.bn = fuse_conv_bn_eval(conv, norm), getattr(norm, 'act', nn.Identity())
    return model


def load_trained(source: str | os.PathLike) -> nn.Module:
    """Loads a model without fusing it: BatchNorm and timm's branches stay; `_hs` and `_csla` models become targets."""
    path = checkpoint_of(source)
    if path.is_file() or path.suffix in ('.tar', '.pth', '.pt', '.safetensors'):
        model = model_from_checkpoint(path, need_scales=False)
    else:
        name = f'local-dir:{path}' if path.is_dir() else os.fspath(source)
        if '/' in name and ':' not in name:
            raise FileNotFoundError(f"'{name}' is not a file or folder. Write a model on the Hub as hf-hub:user/repo.")
        with explaining(f"'{name}' cannot be made"):
            resolve_model(name)
            model = timm.create_model(name, pretrained=True)
    if kind_of(model) != 'target':
        model = to_plain(model)
    return model.eval().float().requires_grad_(False)


@dataclass(frozen=True)
class Classifier:
    """A model from images, float32 of shape (N, C, H, W), to logits. `config` is its preprocessing in timm's names,
    `size` its bytes on disk, `fixed_batch` the number of images that it takes at a time, 0 if any.
    """

    backend: str
    run: Callable[[Tensor], Tensor]
    config: dict[str, Any]
    size: int
    class_names: Sequence[str] = ()
    fixed_batch: int = 0

    def ranked(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits, the largest first, and their classes; of equal ones the lower class is first."""
        logits = self.run(images).float()
        # NaN would count as class 0.
        if not logits.isfinite().all():
            raise ValueError('The model gives logits that are not finite, as after a training that diverged.')
        return logits.sort(dim=1, descending=True, stable=True)

    def images_for(self, count: int) -> int:
        """Rounds a number of images up to whole batches of a model with a fixed batch."""
        return count + -count % self.fixed_batch if self.fixed_batch else count


def is_onnx(source: str | os.PathLike) -> bool:
    return Path(source).suffix == '.onnx'


def load_classifier(
    source: str | os.PathLike, threads: int | None = None, overrides: Mapping[str, Any] | None = None
) -> Classifier:
    """Loads an `.onnx` file, or what `load_model` takes. In PyTorch `threads` applies to the whole process."""
    if is_onnx(source):
        onnx_model = load_onnx(source)
        weights = [each for each in onnx_model.graph.initializer if each.data_type == each.INT8]
        # --reduce-range keeps weights within -64 and 64.
        sizes = [np.abs(require('onnx').numpy_helper.to_array(each).astype(int)).max(initial=0) for each in weights]
        if lacks_vnni() and any(size > 64 for size in sizes):
            _logger.warning(OVERFLOW)
        return onnx_classifier(onnx_model, threads, overrides)
    model = load_model(source)
    if threads:
        torch.set_num_threads(min(threads, core_count()))

    def run(images: Tensor) -> Tensor:
        with explaining(f'The model does not run on images of shape {tuple(images.shape[1:])}'), torch.inference_mode():
            return model(images)

    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    return Classifier('pytorch', run, preprocessing(overrides, model=model), size, label_names(model))


def onnx_classifier(model: Any, threads: int | None = None, overrides: Mapping[str, Any] | None = None) -> Classifier:
    """Wraps an `onnx.ModelProto` from images to logits."""
    metadata = onnx_metadata(model)
    images_name, (batch, *_) = image_input(model)
    session = open_session(model, threads)

    def run(images: Tensor) -> Tensor:
        # A model whose batch size is fixed gets that many at once; repeat the last image to fill the last part.
        missing = -len(images) % batch if batch else 0
        filled = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
        try:
            parts = [session.run(None, {images_name: part.numpy()})[0] for part in filled.split(batch or len(filled))]
        # ONNX Runtime's errors have no common base class.
        except Exception as error:
            raise ValueError(
                f'The model does not run on images of shape {tuple(images.shape[1:])}: {reason_of(error)}'
            ) from None
        return torch.cat([*map(torch.from_numpy, parts)])[: len(images)]

    config = preprocessing(overrides, pretrained_cfg=metadata)
    return Classifier('onnxruntime', run, config, model.ByteSize(), metadata['label_names'], batch)


def onnx_metadata(model: Any) -> dict[str, Any]:
    """Reads what an `onnx.ModelProto` states of architecture, classes and preprocessing, by timm's names."""
    # timm requires an architecture.
    metadata: dict[str, Any] = {'architecture': '', 'label_names': []}
    for entry in model.metadata_props:
        # Other exporters write other text.
        with suppress(ValueError):
            metadata[entry.key] = json.loads(entry.value)
    _, (_, *size) = image_input(model)
    if all(size):
        metadata['input_size'] = size
    return metadata


def logits_of(models: Iterable[Any], images: Images, indices: Sequence[int], title: str) -> list[Tensor]:
    """Runs `onnx.ModelProto`s in one pass over images; returns the logits of each, of shape (N, classes)."""
    runs = [onnx_classifier(model).run for model in models]
    rows = [[run(batch) for run in runs] for batch, _ in images.batches(indices, 32, title)]
    return [torch.cat(parts) for parts in zip(*rows)]


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Returns the largest change of a logit, relative to the largest logit; NaN if a logit is."""
    return (found - expected).abs().max().item() / max(expected.abs().max().item(), 1e-12)


def preprocessing(overrides: Mapping[str, Any] | None = None, **model: Any) -> dict[str, Any]:
    """Returns what `timm.data.resolve_data_config` makes of the overrides and a model."""
    stated = {**model.get('pretrained_cfg', {}), **(overrides or {})}
    # timm knows a PyTorch model's; a foreign ONNX file may state nothing.
    if 'model' not in model and not {'mean', 'std'} <= stated.keys():
        _logger.warning(
            'An ONNX file states no mean and std: images are prepared as for ImageNet. `evaluate`, `predict` and '
            '`quantize` take --mean and --std.'
        )
    with explaining(f'Images cannot be prepared with {dict(overrides or {}) or "what the model states"}'):
        config = resolve_data_config(dict(overrides or {}), **model)
    # A smaller share would resize an image to over a hundred times its pixels.
    if not 0.1 <= config['crop_pct'] <= 1:
        raise ValueError(f'Images cannot be prepared with crop_pct {config["crop_pct"]}, expected 0.1 to 1.')
    return config


def label_names(model: nn.Module) -> list[str]:
    """Returns the names of a timm model's classes in the order of its logits; none if unknown."""
    config: Any = getattr(model, 'pretrained_cfg', None) or {}
    # timm's own weights state their data in their tag alone.
    of_imagenet = {'in1k', 'in12k', 'in21k', 'in22k'}.intersection((config.get('tag') or '').split('_'))
    subset = infer_imagenet_subset(model) if of_imagenet else None
    names = config.get('label_names') or (ImageNetInfo(subset).label_names() if subset else ())
    # timm allows a dict from number to name, for classes with gaps between them.
    complete = isinstance(names, list | tuple) and len(names) == getattr(model, 'num_classes', None)
    return list(names) if complete else []
