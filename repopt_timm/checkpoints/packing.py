"""Weights in fewer bits, for files: matrices and kernels in float16 or in 8 bits per output channel."""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ['PRECISIONS', 'pack', 'unpack']

PRECISIONS = ('float32', 'float16', 'int8')

# As compressed-tensors, the format of quantized weights on the Hub, calls what an 8-bit weight is multiplied with.
_SCALE = '_scale'
_LARGEST = 127


def pack(state_dict: Mapping[str, Tensor], precision: str) -> dict[str, Tensor]:
    """Packs the floating point tensors of two or more dimensions; vectors, such as BatchNorm's, stay as they are.

    Args:
        state_dict: Tensors of a model.
        precision: `float32` for as they are, `float16`, or `int8` for `round(w / s)` with `s = max|w| / 127` of each
            output channel, shape (O,), float32, under the tensor's name and `_scale`.

    Raises:
        ValueError: If there is no such precision, or a value is infinite, NaN or too large for it.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown precision '{precision}', expected one of {', '.join(PRECISIONS)}.")
    packed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if precision == 'float32' or tensor.ndim < 2 or not tensor.is_floating_point():
            packed[name] = tensor.contiguous()
        elif precision == 'float16':
            packed[name] = tensor.half().contiguous()
        else:
            packed[name], packed[name + _SCALE] = _to_int8(tensor)
        source = tensor if packed[name].dtype == torch.int8 else packed[name]
        if source.is_floating_point() and not source.isfinite().all():
            raise ValueError(f"'{name}' has values that {precision} cannot hold, up to {tensor.abs().max().item()}.")
    return packed


def unpack(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Restores what `pack` made 8-bit, as float32; any other state dict comes back as it is.

    Raises:
        ValueError: If the scales of an 8-bit tensor do not fit it.
    """
    packed = {name for name, tensor in state_dict.items() if tensor.dtype == torch.int8 and name + _SCALE in state_dict}
    restored = {}
    for name, tensor in state_dict.items():
        if name in packed:
            scale = state_dict[name + _SCALE]
            if scale.shape != tensor.shape[:1] or not scale.is_floating_point():
                raise ValueError(
                    f"'{name}{_SCALE}' has the shape {tuple(scale.shape)} and type {scale.dtype}, expected a floating "
                    f"point number for each of the output channels of '{name}', {tuple(tensor.shape)}."
                )
            restored[name] = tensor.to(scale.dtype) * scale.view(-1, *[1] * (tensor.ndim - 1))
        elif name.removesuffix(_SCALE) not in packed:
            restored[name] = tensor
    return restored


def _to_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    rows = tensor.float().flatten(1)
    scale = rows.abs().amax(1) / _LARGEST
    # A row of zeros stays one.
    quotient = rows / scale.where(scale > 0, 1.0).unsqueeze(1)
    return quotient.round().to(torch.int8).view(tensor.shape).contiguous(), scale
