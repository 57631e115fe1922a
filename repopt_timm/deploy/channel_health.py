"""What makes a network hard to quantize: channels that never change, and kernels with a few values far too large."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from ..datasets import Images
from .onnx_graph import feeds, layers_of
from .runtime import open_session, require

# Outliers are weights over this multiple of their kernel's 99th percentile: one scale of 8 bits then rounds 99 % of the
# kernel to -1, 0 and 1.
_OUTLIER = 100


def constant_inputs(model: Any, images: Images, indices: Sequence[int]) -> dict[str, np.ndarray]:
    """Maps layers to the value of each input channel that never changes on these images; NaN for the others."""
    tensors = {name: node.inputs[0].name for name, node in layers_of(model).items() if node.op_type in ('Conv', 'Gemm')}
    ranges: dict[str, list[Any]] = {name: [] for name in tensors.values()}
    extended, outputs = copy.deepcopy(model), {value.name for value in model.graph.output}
    extended.graph.output.extend(require('onnx').ValueInfoProto(name=name) for name in ranges if name not in outputs)
    # The optimizer would fuse the requested tensors away.
    session = open_session(extended, optimize=False)
    for feed in feeds(model, images, indices, 'dead channels'):
        for name, values in zip(ranges, session.run([*ranges], feed)):
            axes = (0, *range(2, values.ndim))
            ranges[name] += [(values.min(axes), values.max(axes))]
    found = {}
    for layer, name in tensors.items():
        lows, highs = zip(*ranges[name])
        low, high = np.min(lows, 0), np.max(highs, 0)
        found[layer] = np.where(high - low <= 1e-6 * np.abs(high), high, np.nan).astype(np.float32)
    return found


def kernel_outliers(model: Any) -> dict[str, int]:
    """Maps layers to the number of their weights over 100 times the 99th percentile, where there are any."""
    found = {}
    for layer, node in layers_of(model).items():
        sizes = np.abs(node.inputs[1].const_value.numpy())
        # Kernels that are mostly zeros are pruned, not broken.
        usual = np.percentile(sizes[sizes > 0], 99) if sizes.any() else np.inf
        found[layer] = (sizes > _OUTLIER * usual).sum()
    return counted(found)


def still_channels(model: nn.Module) -> dict[str, int]:
    """Maps BatchNorms to the number of their channels that hardly changed in training, where there are any."""
    found = {}
    for name, norm in model.named_modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and (variance := norm.running_var) is not None:
            # One whose inputs are all small is healthy.
            found[name] = (variance < (1e-3 * variance.max()).clamp(max=norm.eps)).sum()
    return counted(found)


def counted(found: Mapping[str, Any]) -> dict[str, int]:
    """Returns the numbers that are not 0."""
    return {name: int(count) for name, count in found.items() if count}


def health_warnings(
    dead: Mapping[str, int],
    outliers: Mapping[str, int],
    still: Mapping[str, int],
    images: int = 0,
    equalized: bool = False,
) -> list[str]:
    """Returns a line for each kind of channel and weight that was counted, on so many `images`."""
    advice = ' `quantize --equalize` removes channels that are dead on other images too, and equalizes layers.'
    kinds = {
        'channels hardly changed in training, by the variance of their BatchNorm': still,
        f'input channels never changed on these {images} images': dead,
        f'weights are over {_OUTLIER} times the 99th percentile of their kernel': outliers,
    }
    return [
        f'{sum(found.values())} {what}: {", ".join(f"{name} {count}" for name, count in found.items())}.'
        + advice * (not equalized)
        for what, found in kinds.items()
        if found
    ]
