"""Rewrites of a network that change no logit and make it easier to quantize: dead channels removed, layers equalized.

Cross-layer equalization is that of Nagel et al., Data-Free Quantization Through Weight Equalization and Bias
Correction, ICCV 2019: between two layers with a positively homogeneous function f, s f(x / s) = f(x), so a channel's
scale can be moved from one kernel to the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..datasets import Images
from ..reporting import amount
from .channel_health import constant_inputs
from .classifier import image_input, onnx_classifier
from .onnx_graph import Graph

__all__ = ['Equalization', 'describe', 'equalize', 'equalize_layers', 'remove_dead_channels']

_SWEEPS = 100
_BATCH = 32


@dataclass(frozen=True)
class Equalization:
    """A network after the rewrite, and what was done to it.

    Attributes:
        model: The `onnx.ModelProto`.
        removed: Layer to the number of dead input channels whose weights became 0.
        unread: Layer to the number of output channels that nothing reads, whose weights became 0.
        kept: Layer to the number of dead input channels that stayed: constants that zeros around the image break.
        pairs: Layer to the layers that read it, equalized with it.
        left: Layer to why it was not: the operator that stands between or has no such kernel, `output`, `shared kernel`
            or `unread`.
        images: Number of images on which the logits were the same.
        difference: Largest difference between a logit and the original's, of the largest logit.
    """

    model: Any
    removed: Mapping[str, int]
    unread: Mapping[str, int]
    kept: Mapping[str, int]
    pairs: Mapping[str, Sequence[str]]
    left: Mapping[str, str]
    images: int
    difference: float

    @property
    def counts(self) -> dict[str, Any]:
        """All attributes but the model."""
        return {name: value for name, value in vars(self).items() if name != 'model'}


def describe(counts: Mapping[str, Any]) -> str:
    """Puts the `counts` of an `Equalization` into a line."""
    removed, kept, unread = (sum(counts[name].values()) for name in ('removed', 'kept', 'unread'))
    reasons = ', '.join(sorted(set(counts['left'].values()))) or 'none'
    return (
        f'dead input channels: {removed} removed, {kept} kept; output channels that nothing reads: {unread} set to 0; '
        f'{amount(len(counts["pairs"]), "layer")} equalized with readers, {len(counts["left"])} left as they are '
        f'({reasons}); logits within {counts["difference"]:.1e} of the largest on {amount(counts["images"], "image")}'
    )


def equalize(
    model: Any, images: Images, indices: Sequence[int], others: Sequence[int] = (), tolerance: float = 1e-4
) -> Equalization:
    """Removes dead channels, then equalizes layers.

    A channel that is dead on a few images may be alive on the next one, so the logits are compared on images that had
    no part in it. Where they differ, these join in, until further ones agree or all are used.

    Args:
        model: A float `onnx.ModelProto`, which stays as it is.
        images: Where images come from.
        indices: Those that a channel has to be constant on, and that the logits are compared on.
        others: Further ones to compare the logits on, as many at a time as there are `indices`.
        tolerance: Largest allowed change of a logit, of the largest logit.

    Raises:
        ValueError: If an image does not decode, ONNX Runtime cannot run the model, or a logit changes by more than
            `tolerance`.
    """
    used, fresh = list(indices), list(others)
    while True:
        count = max(len(used), _BATCH)
        checked, fresh = [*used, *fresh[:count]], fresh[count:]
        graph = Graph(model)
        removed, unread, kept = remove_dead_channels(graph, constant_inputs(model, images, used))
        pairs, left = equalize_layers(graph)
        difference = _difference(model, graph.model, images, checked)
        if difference <= tolerance:
            return Equalization(graph.model, removed, unread, kept, pairs, left, len(checked), difference)
        if len(checked) == len(used) or not np.isfinite(difference):
            raise ValueError(
                f'The equalized model differs: a logit by {difference:.1e} of the largest, expected at most '
                f'{tolerance:.0e}; weights that are not trained can amplify rounding that much. Quantize without '
                f'--equalize.'
            )
        used = checked


def remove_dead_channels(
    graph: Graph, constants: Mapping[str, np.ndarray]
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Zeroes the weights of input channels that never change, and of output channels that nothing reads.

    A constant other than 0 moves to the bias. It stays where a convolution pads with zeros: its border then sees less
    of it than its middle.

    Args:
        graph: What to change.
        constants: What `constant_inputs` returned for it.

    Returns:
        Layer to numbers of channels: input channels that were removed, output channels that were, and dead input
        channels that stayed.
    """
    removed: dict[str, int] = {}
    unread: dict[str, int] = {}
    kept: dict[str, int] = {}
    for layer, values in constants.items():
        kernel = graph.kernel(layer)
        if kernel is None:
            continue
        groups, _, width, _ = kernel.shape
        dead = ~np.isnan(values) & ((values == 0) | (not graph.has_padding(layer)))
        moved = np.where(dead, values, 0).reshape(groups, 1, width)
        if moved.any():
            bias = graph.bias(layer, create=True)
            assert bias is not None
            bias += (kernel.sum(3) * moved).sum(2).reshape(-1)
        kernel *= ~dead.reshape(groups, 1, width, 1)
        removed[layer], kept[layer] = int(dead.sum()), int((~np.isnan(values) & ~dead).sum())
    # What becomes unread by this is further up.
    for layer in reversed(graph.layers):
        rows, columns = graph.kernel(layer), _read_columns(graph, layer)
        if rows is None or columns is None:
            continue
        needless = (columns == 0) & (_row_sizes(rows) > 0)
        rows *= ~needless.reshape(*rows.shape[:2], 1, 1)
        bias = graph.bias(layer)
        if bias is not None:
            bias *= columns > 0
        unread[layer] = int(needless.sum())
    removed, unread, kept = ({layer: n for layer, n in found.items() if n} for found in (removed, unread, kept))
    return removed, unread, kept


def equalize_layers(graph: Graph) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Moves scales of channels between layers until the largest weights of both sides are equal.

    Args:
        graph: What to change.

    Returns:
        Equalized layer to the layers that read it; and layer to the reason for the others.
    """
    pairs, left = {}, {}
    for layer in graph.layers:
        readers, reason = graph.readers(layer)
        columns = _read_columns(graph, layer)
        if reason:
            left[layer] = reason
        elif columns is not None and not columns.any():
            left[layer] = 'unread'
        elif columns is None:
            left[layer] = next(filter(None, map(graph.obstacle, (layer, *readers))), 'shape') if readers else 'unread'
        else:
            pairs[layer] = readers
    for _ in range(_SWEEPS):
        if max((_equalize_pair(graph, *pair) for pair in pairs.items()), default=1.0) < 1.001:
            break
    return pairs, left


def _equalize_pair(graph: Graph, layer: str, readers: Sequence[str]) -> float:
    """Equalizes a layer with its readers; returns the largest factor."""
    rows, columns = graph.kernel(layer), _read_columns(graph, layer)
    assert rows is not None and columns is not None
    sizes = _row_sizes(rows)
    both = (sizes > 0) & (columns > 0)
    scale = np.sqrt(np.divide(sizes, columns, where=both, out=np.ones_like(sizes)))
    rows /= scale.reshape(*rows.shape[:2], 1, 1)
    bias = graph.bias(layer)
    if bias is not None:
        bias /= scale
    for reader in readers:
        kernel = graph.kernel(reader)
        assert kernel is not None
        groups, _, width, _ = kernel.shape
        kernel *= np.repeat(scale, groups * width // len(scale)).reshape(groups, 1, width, 1)
    return float(np.maximum(scale, 1 / scale).max())


def _row_sizes(kernel: np.ndarray) -> np.ndarray:
    return np.abs(kernel).max((2, 3)).reshape(-1)


def _read_columns(graph: Graph, layer: str) -> np.ndarray | None:
    """Returns the largest weight with which each output channel of a layer is read, or None if that is not known."""
    rows = graph.kernel(layer)
    readers, reason = graph.readers(layer)
    kernels = [graph.kernel(reader) for reader in readers]
    if rows is None or reason or not kernels:
        return None
    channels = rows.shape[0] * rows.shape[1]
    found = np.zeros(channels, rows.dtype)
    for kernel in kernels:
        if kernel is None or kernel.shape[0] * kernel.shape[2] % channels:
            return None
        # A flattened map has several columns for a channel.
        sizes = np.abs(kernel).max((1, 3)).reshape(channels, -1)
        found = np.maximum(found, sizes.max(1))
    return found


def _difference(model: Any, changed: Any, images: Images, indices: Sequence[int]) -> float:
    first, second = onnx_classifier(model), onnx_classifier(changed)
    difference = largest = 0.0
    fixed = image_input(model)[1][0]
    for batch, _ in images.batches(indices, fixed or _BATCH, 'equalization'):
        expected, found = first.run(batch), second.run(batch)
        # Unlike `max`, it passes NaN on.
        difference = float(np.maximum(difference, (found - expected).abs().max().item()))
        largest = max(largest, expected.abs().max().item())
    return difference / max(largest, 1e-12)
