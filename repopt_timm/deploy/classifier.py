"""What is evaluated: a PyTorch model or an ONNX one behind one call."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.data.transforms import str_to_interp_mode
from torch import Tensor, nn

from ..color_modes import noted_color_mode
from .runtime import explained, load_onnx, open_session
from .trained_model import load_model

__all__ = [
    'Classifier',
    'data_config',
    'image_input',
    'is_onnx',
    'label_names',
    'load_classifier',
    'onnx_classifier',
    'preprocessing',
    'torch_classifier',
]


@dataclass(frozen=True)
class Classifier:
    """A model that classifies images.

    Attributes:
        backend: `pytorch` or `onnxruntime`.
        run: Images, float32 of shape (N, C, H, W), to logits of shape (N, classes).
        config: Preprocessing, as `preprocessing` gives it.
        size: Bytes on disk: of the ONNX file, or of the parameters and buffers of a PyTorch model.
        class_names: Names of the classes in the order of the logits, if known.
        fixed_batch: Images that the model takes at a time; 0 if any number.
    """

    backend: str
    run: Callable[[Tensor], Tensor]
    config: dict[str, Any]
    size: int
    class_names: Sequence[str] = ()
    fixed_batch: int = 0

    def images_for(self, count: int) -> int:
        """Returns the number of images that the model computes for `count` of them, the last batch being filled."""
        return count + -count % self.fixed_batch if self.fixed_batch else count


def is_onnx(source: str | os.PathLike) -> bool:
    """Returns whether a source is an ONNX file, by its name."""
    return Path(source).suffix == '.onnx'


def load_classifier(
    source: str | os.PathLike, threads: int | None = None, overrides: Mapping[str, Any] | None = None
) -> Classifier:
    """Loads what is to be evaluated.

    Args:
        source: An `.onnx` file, or what `load_model` takes.
        threads: Number of threads. Defaults to all cores.
        overrides: Preprocessing that differs from the model's own, by timm's names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be loaded.
    """
    if is_onnx(source):
        return onnx_classifier(load_onnx(source), threads, overrides, f"'{source}'")
    return torch_classifier(load_model(source), threads, overrides)


def torch_classifier(
    model: nn.Module, threads: int | None = None, overrides: Mapping[str, Any] | None = None
) -> Classifier:
    """Wraps a PyTorch model; `threads` applies to the whole process."""
    if threads:
        torch.set_num_threads(threads)

    def run(images: Tensor) -> Tensor:
        try:
            with torch.inference_mode():
                return model(images)
        except (AssertionError, RuntimeError) as error:
            reason = ' '.join(str(error).split())[:200]
            raise ValueError(
                f'The model cannot run on {tuple(images.shape)} images: {reason}. Give it an input size that it takes.'
            ) from None

    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    config = preprocessing(overrides, model=model)
    return Classifier('pytorch', run, config, size, label_names(model))


def onnx_classifier(
    model: Any, threads: int | None = None, overrides: Mapping[str, Any] | None = None, name: str = 'the model'
) -> Classifier:
    """Wraps an `onnx.ModelProto` from images to logits; `name` is what errors call it."""
    config = data_config(model, overrides)
    session = open_session(model, threads, name=name)
    images_name, (batch, *_) = image_input(model)

    def run(images: Tensor) -> Tensor:
        # A model whose batch size is fixed gets that many at once; repeat the last image to fill the last part.
        parts = images.split(batch) if batch else [images]
        missing = max(0, batch - len(parts[-1]))
        if missing:
            parts = [*parts[:-1], torch.cat([parts[-1], parts[-1][-1:].expand(missing, -1, -1, -1)])]
        with explained(f'ONNX Runtime cannot run the model on {tuple(images.shape)} images'):
            logits = torch.cat([torch.from_numpy(session.run(None, {images_name: part.numpy()})[0]) for part in parts])
        return logits[: len(images)]

    return Classifier('onnxruntime', run, config, model.ByteSize(), _metadata(model).get('label_names', ()), batch)


def preprocessing(overrides: Mapping[str, Any] | None = None, **model: Any) -> dict[str, Any]:
    """Returns what `timm.data.resolve_data_config` makes of the overrides and a model, and their `input_img_mode`.

    Raises:
        ValueError: If `mean` or `std` do not have a value for each channel, or a value is not one that images can be
            prepared with.
    """
    overrides = dict(overrides or {})
    try:
        config = resolve_data_config(overrides, **model)
        _check_preprocessing(config)
        mode = overrides.get('input_img_mode') or _stated_mode(**model)
        return {**config, 'input_img_mode': mode} if mode else config
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f'The preprocessing that the model states cannot be read: {error}. Give your own.') from None
    except AssertionError:
        given = ', '.join(f'{name} {overrides[name]}' for name in ('mean', 'std') if name in overrides)
        raise ValueError(f'Preprocessing with {given}: expected one value, or one for each channel.') from None


def _stated_mode(model: Any = None, pretrained_cfg: Mapping[str, Any] | None = None) -> str | None:
    if pretrained_cfg is None:
        return noted_color_mode(model)
    mode = pretrained_cfg.get('input_img_mode')
    return mode if isinstance(mode, str) else None


def _check_preprocessing(config: Mapping[str, Any]) -> None:
    sizes, crop = config['input_size'], config['crop_pct']
    wrong = {
        'input_size': not all(isinstance(size, int) and size > 0 for size in sizes),
        'mean': not config['mean'] or not all(math.isfinite(value) for value in config['mean']),
        'std': not config['std'] or not all(math.isfinite(value) and value > 0 for value in config['std']),
        # Less would enlarge an image a hundred times.
        'crop_pct': not 0.1 <= crop <= 1,
        'crop_mode': config['crop_mode'] not in ('center', 'squash', 'border'),
    }
    # Fails with an error of its own.
    str_to_interp_mode(config['interpolation'])
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f'Preprocessing with {name} {config[name]!r:.80} is not possible: give another one.')


def label_names(model: nn.Module) -> list[str]:
    """Returns the names of a timm model's classes in the order of its logits; none if unknown."""
    config: Any = getattr(model, 'pretrained_cfg', None) or {}
    names = config.get('label_names') or ()
    # timm allows a dict from number to name, for classes with gaps between them.
    complete = isinstance(names, list | tuple) and len(names) == getattr(model, 'num_classes', None)
    return list(names) if complete else []


def _metadata(model: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for entry in model.metadata_props:
        try:
            metadata[entry.key] = json.loads(entry.value)
        except (RecursionError, ValueError):
            continue
    names = metadata.get('label_names')
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        metadata.pop('label_names', None)
    return metadata


def image_input(model: Any) -> tuple[str, list[int]]:
    """Returns name and sizes of an `onnx.ModelProto`'s input; sizes that are not fixed, as batches should be, are 0."""
    constants = {tensor.name for tensor in model.graph.initializer}
    images = next(value for value in model.graph.input if value.name not in constants)
    return images.name, [size.dim_value for size in images.type.tensor_type.shape.dim]


def data_config(model: Any, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the preprocessing in the metadata of an `onnx.ModelProto`, completed by timm's defaults.

    Args:
        model: An exported model, or any from images to logits.
        overrides: Values that differ, by timm's names.

    Raises:
        ValueError: If the input is not a batch of images.
    """
    metadata = _metadata(model)
    name, sizes = image_input(model)
    if len(sizes) != 4:
        raise ValueError(f"The ONNX model's input '{name}' has {len(sizes)} dimensions, expected 4: (N, C, H, W).")
    if all(sizes[1:]):
        metadata['input_size'] = sizes[1:]
    # timm requires an architecture.
    config = preprocessing(overrides, pretrained_cfg={'architecture': '', **metadata})
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
