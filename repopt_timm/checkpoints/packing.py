"""Weights in fewer bits, for files: matrices and kernels in float16 or in 8 bits per output channel."""

from collections.abc import Mapping

import torch
from torch import Tensor

PRECISIONS = ('float32', 'float16', 'int8')

# compressed-tensors, the Hub's format for quantized weights, uses this suffix for its factors.
_SCALE = '_scale'


def pack(state_dict: Mapping[str, Tensor], precision: str) -> dict[str, Tensor]:
    """Packs floating point tensors of two or more dimensions; others, such as BatchNorm's, stay as they are.

    `int8` is `round(w / s)` with `s = max|w| / 127` of each output channel, float32, under the tensor's name and
    `_scale`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"'{precision}' is not a precision, expected one of {', '.join(PRECISIONS)}.")
    packed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if precision == 'float32' or tensor.ndim < 2 or not tensor.is_floating_point():
            packed[name] = tensor.contiguous()
        elif precision == 'float16':
            packed[name] = tensor.half().contiguous()
            if not packed[name].isfinite().all():
                raise ValueError(f"'{name}' has values up to {tensor.abs().max():g}, which float16 cannot hold.")
        else:
            rows = tensor.float().flatten(1)
            scale = rows.abs().amax(1) / 127
            # Rows of zeros stay zero.
            quotient = rows / scale.where(scale > 0, 1.0).unsqueeze(1)
            packed[name] = quotient.round().to(torch.int8).view(tensor.shape).contiguous()
            packed[name + _SCALE] = scale
    return packed


def unpack(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Restores what `pack` made 8-bit, as float32; any other state dict comes back as it is."""
    restored = dict(state_dict)
    for name, tensor in state_dict.items():
        if tensor.dtype == torch.int8 and name + _SCALE in state_dict:
            scale = restored.pop(name + _SCALE)
            # A scalar would broadcast silently.
            if scale.shape != tensor.shape[:1]:
                raise ValueError(
                    f"'{name}{_SCALE}' has shape {tuple(scale.shape)}, expected {tuple(tensor.shape[:1])}."
                )
            restored[name] = tensor * scale.view(-1, *[1] * (tensor.ndim - 1))
    return restored
