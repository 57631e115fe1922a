"""The updates of single kernels, as the equations have them, for `torch.compile` to make one pass over memory of."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reparam.grad_mult import MaskParts, dense_mask

__all__ = ['adamw_update', 'compiled', 'sgd_update']


_ALWAYS_FUSE: Any = {'realize_reads_threshold': 1000, 'realize_opcount_threshold': 1000}


@functools.cache
def compiled(update: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles an update, once for kernels of all sizes; they have to be given detached.

    Left to itself, the compiler would write the dense Grad Mult to memory, and make code for each size of a parameter.
    """
    return torch.compile(update, dynamic=True, options=_ALWAYS_FUSE)


def sgd_update(
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
    grad = grad * dense_mask(*parts)
    grad = (-grad if maximize else grad) + weight_decay * param
    if buffer is not None:
        buffer.mul_(momentum).add_((1 - dampening) * grad)
        grad = grad + momentum * buffer if nesterov else buffer
    param.sub_(lr * grad)


def adamw_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    parts: MaskParts,
    lr: Tensor,
    betas: Sequence[Tensor],
    corrections: Sequence[Tensor],
    eps: Tensor,
    weight_decay: Tensor,
    maximize: bool,
) -> None:
    """Updates a kernel and its moments as AdamW does, gradient and update multiplied with the Grad Mult.

    The bias corrections, `1 / (1 - beta1**step)` and `1 / sqrt(1 - beta2**step)`, come from outside, because fused code
    would work them out for each element.
    """
    dense = dense_mask(*parts)
    grad = (-grad if maximize else grad) * dense
    exp_avg.mul_(betas[0]).add_((1 - betas[0]) * grad)
    exp_avg_sq.mul_(betas[1]).add_((1 - betas[1]) * grad * grad)
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        second = max_exp_avg_sq.copy_(torch.maximum(max_exp_avg_sq, exp_avg_sq))
    denominator = second.sqrt() * corrections[1] + eps
    param.mul_(1 - lr * weight_decay).sub_(lr * corrections[0] * dense * (exp_avg / denominator))
