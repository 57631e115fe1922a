"""What makes a network hard to quantize: channels that never change, and kernels with a few values far too large."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from ..datasets import Images
from .classifier import image_input
from .onnx_graph import layers_of
from .runtime import open_session, require

__all__ = ['constant_inputs', 'health_warnings', 'kernel_outliers', 'still_channels']

# Images whose activations are in memory at a time.
_BATCH = 8

# Of the 99th percentile: one scale of 8 bits then rounds 99 % of the kernel to -1, 0 and 1.
_OUTLIER = 100

# Of the largest variance of the same BatchNorm; one whose inputs are all small is healthy.
_STILL = 1e-3


def constant_inputs(model: Any, images: Images, indices: Sequence[int]) -> dict[str, np.ndarray]:
    """Finds the input channels of layers that have the same value everywhere, in all of some images.

    Args:
        model: A float `onnx.ModelProto`.
        images: Where images come from.
        indices: Those to run.

    Returns:
        Layer to a float32 vector: the value of each input channel that is constant, NaN for the others.

    Raises:
        ValueError: If an image does not decode, or ONNX Runtime cannot run the model.
    """
    ir = require('onnx_ir')
    graph = ir.from_proto(model)
    tensors = {name: node.inputs[0] for name, node in layers_of(graph).items() if node.op_type in ('Conv', 'Gemm')}
    wanted = list(dict.fromkeys(tensors.values()))
    graph.graph.outputs.extend(value for value in wanted if not value.is_graph_output())
    # The optimizer would fuse the requested tensors away.
    session = open_session(ir.to_proto(graph), optimize=False)
    input_name, (fixed, *_) = image_input(model)
    names = [value.name for value in wanted]
    lowest: dict[str, Any] = dict.fromkeys(names, np.inf)
    highest: dict[str, Any] = dict.fromkeys(names, -np.inf)
    for batch, _ in images.batches(indices, fixed or _BATCH, 'dead channels', whole=fixed > 0):
        for name, values in zip(names, session.run(names, {input_name: batch.numpy()})):
            axes = (0, *range(2, values.ndim))
            lowest[name] = np.minimum(lowest[name], values.min(axes))
            highest[name] = np.maximum(highest[name], values.max(axes))
    found = {}
    for layer, tensor in tensors.items():
        low, high = lowest[tensor.name], highest[tensor.name]
        found[layer] = np.where(high - low <= 1e-6 * np.abs(high), high, np.nan).astype(np.float32)
    return found


def kernel_outliers(model: Any) -> dict[str, int]:
    """Counts the values of kernels beside which one scale for the kernel rounds all but a hundredth to -1, 0 and 1.

    Args:
        model: A float `onnx.ModelProto`.

    Returns:
        Layer to the number of its values that are over 100 times the 99th percentile, for each layer that has any.
    """
    found = {}
    for layer, node in layers_of(model).items():
        sizes = np.abs(node.inputs[1].const_value.numpy())
        # Kernels that are mostly zeros are pruned, not broken.
        usual = np.percentile(sizes[sizes > 0], 99) if sizes.any() else np.inf
        if count := int((sizes > _OUTLIER * usual).sum()):
            found[layer] = count
    return found


def still_channels(model: nn.Module) -> dict[str, int]:
    """Counts the channels that hardly changed in training.

    Args:
        model: As it was trained, branches not merged.

    Returns:
        BatchNorm to the number of its channels whose running variance is below its eps and next to nothing beside that
        of others, for each that has any.
    """
    found = {}
    for name, norm in model.named_modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_var is not None:
            variance = norm.running_var
            if count := int((variance < (_STILL * variance.max()).clamp(max=norm.eps)).sum()):
                found[name] = count
    return found


def health_warnings(
    dead: Mapping[str, int], outliers: Mapping[str, int], images: int = 0, still: Mapping[str, int] | None = None
) -> list[str]:
    """Puts counts of channels and weights into a line each.

    Args:
        dead: Layer to number of dead input channels.
        outliers: Layer to number of outliers.
        images: Images on which the channels were constant.
        still: BatchNorm to number of channels that hardly changed in training.
    """
    kinds = (
        (
            still or {},
            'channels hardly changed in training, by the variance of their BatchNorm',
            'removes dead channels',
        ),
        (
            dead,
            f'input channels never changed on these {images} images',
            'removes a channel if it never changes on other images either',
        ),
        (outliers, f'weights are over {_OUTLIER} times the 99th percentile of their kernel', 'may help'),
    )
    return [
        f'{sum(found.values())} {what}: {", ".join(f"{name} {count}" for name, count in found.items())}. '
        f'`quantize --equalize` {effect}.'
        for found, what, effect in kinds
        if found
    ]
