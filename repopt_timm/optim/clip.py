"""Gradient clipping that keeps the equivalence with the CSLA network."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..reparam import GradMults
from ..reparam.modules import whole


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    grad_mults: GradMults,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clips gradients by the norm that they would have in the CSLA network, `sqrt(sum M g^2)` with the Grad Mults M.

    A branch with the scale s has s times the kernel's gradient, so the norm of the plain gradients would clip at other
    times and by other factors. The power is 2 whatever the optimizer, RepOptAdamW too.

    Args:
        parameters: Parameters whose gradients are clipped in place; `fully_shard` may have sharded them.
        max_norm: Largest norm that is let through.
        grad_mults: What `make_grad_mults(model, update_rule='sgd')` returned.
        error_if_nonfinite: Raise if the norm is NaN or infinite.
        foreach: Use torch's multi-tensor implementation.

    Returns:
        The norm before clipping, a scalar.

    Raises:
        ValueError: If the Grad Mults are for another update rule, or for none of the kernels.
        RuntimeError: If the norm is not finite and `error_if_nonfinite` is set.
    """
    if grad_mults.update_rule != 'sgd':
        raise ValueError(
            f"The CSLA norm needs make_grad_mults(model, update_rule='sgd') for every optimizer, but got the update "
            f'rule {grad_mults.update_rule!r}.'
        )
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    kernels = [param for param in parameters if param.ndim == 4]
    if kernels and len(grad_mults) and not any(param in grad_mults for param in kernels):
        raise ValueError(
            f'None of the {len(kernels)} kernels given to clip_grad_norm_ is among the {len(grad_mults)} that have a '
            f'Grad Mult. Make the Grad Mults from the very model whose parameters these are.'
        )
    # In the mask's float32: squares of small float16 gradients are zero in float16.
    grads = [
        param.grad * grad_mults[param].sqrt() if param in grad_mults else param.grad
        for param in parameters
        if param.grad is not None
    ]
    total_norm: Any = get_total_norm(grads, 2.0, error_if_nonfinite, foreach)
    total_norm = whole(total_norm)
    clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
    return total_norm
