"""The updates of kernels, as the equations have them, for `torch.compile` to make one pass over memory of each."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reparam import GradMult
from ..reparam.branches import margins

__all__ = ['MaskParts', 'adamw_updates', 'compiled', 'mask_parts', 'sgd_updates']

MaskParts = tuple[Tensor, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor, Tensor]]]

_ALWAYS_FUSE: Any = {'realize_reads_threshold': 1000, 'realize_opcount_threshold': 1000}


@functools.cache
def compiled(update: Callable[..., None]) -> Callable[..., None]:
    """Compiles an update of kernels as one graph; left to itself, the compiler would write masks to memory."""
    return torch.compile(update, options=_ALWAYS_FUSE)


def mask_parts(mult: GradMult, kernel: Tensor) -> MaskParts:
    """Splits a Grad Mult into vectors of a number per row, and patterns that all rows share.

    Code that reads patterns along with a kernel vectorizes; code that works out where a tap lies does not.

    Args:
        mult: Grad Mult.
        kernel: Its kernel, which the patterns lie in memory like.

    Returns:
        What is added everywhere; vector and pattern of what is added to some taps; vector, pattern and the input
        channel of each row of what is added to the diagonal, where the pattern is the channel on its taps, else -1.
    """
    base = mult.taps[:, :, :1, :1].contiguous()
    layout = torch.channels_last if kernel.stride(1) == 1 else torch.contiguous_format
    zeros = torch.zeros_like(mult.taps[:1]).expand(1, mult.channels, -1, -1)
    windows: list[tuple[Tensor, Tensor]] = []
    for y in range(kernel.shape[2]):
        for x in range(kernel.shape[3]):
            added = mult.taps[:, :, y : y + 1, x : x + 1] - base
            if not added.any():
                continue
            known = [pattern for vector, pattern in windows if torch.equal(vector, added)]
            if not known:
                known = [zeros.contiguous(memory_format=layout)]
                windows.append((added, known[0]))
            known[0][:, :, y, x] = 1
    diagonals = []
    if mult.diagonal is not None:
        height, width = mult.diagonal.shape[2:]
        top, left = margins(kernel.shape[2:], (height, width))
        rows = torch.arange(len(mult.taps), device=kernel.device, dtype=torch.int32) + mult.first_row
        channels = torch.arange(mult.channels, device=kernel.device, dtype=torch.int32).view(1, -1, 1, 1)
        for y in range(height):
            for x in range(width):
                pattern = F.pad(channels, (left + x, kernel.shape[3] - left - x - 1, 0, 0), value=-1)
                pattern = F.pad(pattern, (0, 0, top + y, kernel.shape[2] - top - y - 1), value=-1)
                vector = mult.diagonal[:, :, y : y + 1, x : x + 1].contiguous()
                pattern = pattern.contiguous(memory_format=layout)
                diagonals.append((vector, pattern, (rows % mult.channels).view(-1, 1, 1, 1)))
    return base, windows, diagonals


def _dense_mask(parts: MaskParts) -> Tensor:
    mask, windows, diagonals = parts
    for vector, pattern in windows:
        mask = mask + vector * pattern
    for vector, pattern, columns in diagonals:
        mask = mask + torch.where(pattern == columns, vector, 0.0)
    return mask


def sgd_updates(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None], parts: list[MaskParts], settings: Any
) -> None:
    """Updates kernels as SGD does; settings are those of `_sgd_update`."""
    for each in zip(params, grads, buffers, parts):
        _sgd_update(*each, **settings)


def adamw_updates(
    params: list[Tensor],
    grads: list[Tensor],
    moments: list[list[Tensor]],
    corrections: list[tuple[Tensor, Tensor]],
    parts: list[MaskParts],
    settings: Any,
) -> None:
    """Updates kernels as AdamW does; settings are those of `_adamw_update`."""
    first, second, *largest = moments
    maxima: Sequence[Tensor | None] = largest[0] if largest else [None] * len(params)
    for each in zip(params, grads, first, second, maxima, parts, corrections):
        _adamw_update(*each, **settings)


def _sgd_update(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    parts: MaskParts,
    lr: Tensor,
    momentum: Tensor,
    dampening: Tensor,
    weight_decay: Tensor,
    nesterov: bool,
    maximize: bool,
) -> None:
    """Updates a kernel and its momentum as SGD does, from its gradient times its Grad Mult."""
    grad = grad * _dense_mask(parts)
    grad = (-grad if maximize else grad) + weight_decay * param
    if buffer is not None:
        buffer.mul_(momentum).add_((1 - dampening) * grad)
        grad = grad + momentum * buffer if nesterov else buffer
    param.sub_(lr * grad)


def _adamw_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    parts: MaskParts,
    corrections: tuple[Tensor, Tensor],
    lr: Tensor,
    betas: Sequence[Tensor],
    eps: Tensor,
    weight_decay: Tensor,
    maximize: bool,
) -> None:
    """Updates a kernel and its moments as AdamW does, gradient and update multiplied with the Grad Mult.

    The bias corrections, `1 / (1 - beta1**step)` and `1 / sqrt(1 - beta2**step)`, come from outside, because fused code
    would work them out for each element.
    """
    dense = _dense_mask(parts)
    grad = (-grad if maximize else grad) * dense
    exp_avg.mul_(betas[0]).add_((1 - betas[0]) * grad)
    exp_avg_sq.mul_(betas[1]).add_((1 - betas[1]) * grad * grad)
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        second = max_exp_avg_sq.copy_(torch.maximum(max_exp_avg_sq, exp_avg_sq))
    denominator = second.sqrt() * corrections[1] + eps
    param.mul_(1 - lr * weight_decay).sub_(lr * corrections[0] * dense * (exp_avg / denominator))
