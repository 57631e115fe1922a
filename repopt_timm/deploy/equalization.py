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
from .channel_health import constant_inputs, counted
from .classifier import largest_difference, logits_of
from .onnx_graph import Graph


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
        difference: Largest change of a logit, relative to the largest logit.
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
    layers, images = len(counts['pairs']), counts['images']
    return (
        f'dead input channels: {removed} removed, {kept} kept; output channels that nothing reads: {unread} set to 0; '
        f'{layers} layer{"s" * (layers != 1)} equalized with readers, {len(counts["left"])} left as they are '
        f'({reasons}); logits within {counts["difference"]:.1e} of the largest on {images} image{"s" * (images != 1)}'
    )


def equalize(
    model: Any, images: Images, indices: Sequence[int], others: Sequence[int] = (), tolerance: float = 1e-4
) -> Equalization:
    """Removes dead channels, then equalizes layers.

    A channel that is dead on a few images may be alive on the next one, so the logits are compared on images that had
    no part in it. If they differ, these images join the search for dead channels, until the logits agree on further
    images or no image is left.

    Args:
        model: A float `onnx.ModelProto`, which stays as it is.
        images: Where images come from.
        indices: Images on which a dead channel must be constant; the logits are compared on them as well.
        others: Further images to compare the logits on, as many at a time as were used
            before, at least 32.
        tolerance: Largest allowed change of a logit, relative to the largest logit.

    Raises:
        ValueError: If an image does not decode, ONNX Runtime cannot run the model, or a logit changes by more than
            `tolerance`.
    """
    used, fresh = list(indices), list(others)
    while True:
        count = max(len(used), 32)
        checked, fresh = [*used, *fresh[:count]], fresh[count:]
        graph = Graph(model)
        removed, unread, kept = _remove_dead_channels(graph, constant_inputs(model, images, used))
        pairs = {layer: readers for layer, readers in graph.readers.items() if _read_columns(graph, layer).any()}
        for _ in range(100):
            if max((_equalize_pair(graph, layer) for layer in pairs), default=1.0) < 1.001:
                break
        left = {layer: graph.left.get(layer, 'unread') for layer in graph.layers if layer not in pairs}
        expected, found = logits_of((model, graph.model), images, checked, 'equalization')
        difference = largest_difference(found, expected)
        if difference <= tolerance:
            return Equalization(graph.model, removed, unread, kept, pairs, left, len(checked), difference)
        if len(checked) == len(used) or not np.isfinite(difference):
            raise ValueError(
                f"The equalized model's logits change by {difference:.1e} of the largest logit, expected at most "
                f'{tolerance:.0e}. Quantize without --equalize.'
            )
        used = checked


def _remove_dead_channels(graph: Graph, constants: Mapping[str, np.ndarray]) -> list[dict[str, int]]:
    """Zeroes dead weights; counts input channels removed, output channels that nothing reads, and dead inputs kept."""
    removed, unread, kept = {}, {}, {}
    for layer, kernel in graph.kernels.items():
        groups, _, width, _ = kernel.shape
        values, attributes = constants[layer].reshape(groups, 1, width), graph.layers[layer].attributes
        # A constant other than 0 moves to the bias, unless zeros around the image interrupt it.
        padded = any(attributes.get_ints('pads', ())) or attributes.get_string('auto_pad', '').startswith('SAME')
        dead = (values == 0) | ~(np.isnan(values) | padded)
        graph.biases[layer] += (kernel.sum(3) * np.where(dead, values, 0)).sum(2).reshape(-1)
        kernel *= ~dead[..., None]
        removed[layer], kept[layer] = dead.sum(), (~np.isnan(values) & ~dead).sum()
    # Removed inputs can leave outputs of earlier layers unread, so go backwards.
    for layer in reversed(graph.readers):
        rows, columns = graph.kernels[layer], _read_columns(graph, layer)
        unread[layer] = ((columns == 0) & (_row_sizes(rows) > 0)).sum()
        rows *= (columns > 0).reshape(*rows.shape[:2], 1, 1)
        graph.biases[layer] *= columns > 0
    return [*map(counted, (removed, unread, kept))]


def _equalize_pair(graph: Graph, layer: str) -> float:
    """Makes the largest weights of each channel equal in a layer and its readers; returns the largest factor."""
    rows, columns = graph.kernels[layer], _read_columns(graph, layer)
    sizes = _row_sizes(rows)
    both = (sizes > 0) & (columns > 0)
    scale = np.sqrt(np.divide(sizes, columns, where=both, out=np.ones_like(sizes)))
    rows /= scale.reshape(*rows.shape[:2], 1, 1)
    graph.biases[layer] /= scale
    for kernel in map(graph.kernels.__getitem__, graph.readers[layer]):
        groups, _, width, _ = kernel.shape
        kernel *= np.repeat(scale, groups * width // len(scale)).reshape(groups, 1, width, 1)
    return float(np.maximum(scale, 1 / scale).max())


def _row_sizes(kernel: np.ndarray) -> np.ndarray:
    return np.abs(kernel).max((2, 3)).reshape(-1)


def _read_columns(graph: Graph, layer: str) -> np.ndarray:
    """Returns the largest weight with which each output channel of a layer is read."""
    sizes = [np.abs(graph.kernels[reader]).max((1, 3)) for reader in graph.readers[layer]]
    return np.maximum.reduce([columns.reshape(len(graph.biases[layer]), -1).max(1) for columns in sizes])
