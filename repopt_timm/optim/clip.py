"""Gradient clipping that keeps the equivalence with the CSLA network."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..reparam import GradMult, GradMults
from .base import gradient
from .chunks import rows_of
from .sharding import sum_over_shards

__all__ = ['clip_grad_norm_']


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    grad_mults: GradMults,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clips gradients by the norm that they would have in the CSLA network, `sqrt(sum M g^2)` with `M = sum s_b^2 M_b`.

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
        ValueError: If the Grad Mults are those of another update rule, or of none of the kernels.
        RuntimeError: If a gradient is sparse, or the norm is not finite and `error_if_nonfinite` is set.
    """
    if grad_mults.update_rule != 'sgd':
        raise ValueError(
            f"The CSLA norm needs Grad Mults of the update rule 'sgd', but got {grad_mults.update_rule!r}. Make them "
            f"with make_grad_mults(model, update_rule='sgd'), for every optimizer."
        )
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    _check_kernels(parameters, grad_mults)
    parameters = [param for param in parameters if param.grad is not None]
    if not parameters:
        return torch.tensor(0.0)
    plain = [param for param in parameters if param not in grad_mults]
    squares = [(param, norm.square()) for param, norm in zip(plain, _norms([gradient(param) for param in plain]))]
    for param in parameters:
        if param in grad_mults:
            grad = gradient(param)
            of_rows = [_square(rows.of(grad), rows.mult) for rows in rows_of(param, grad_mults[param])]
            # This process may hold none of a kernel's rows.
            squares += [(param, square) for square in of_rows or [grad.new_zeros((), dtype=torch.float32)]]
    total_norm = sum_over_shards(*zip(*squares)).sqrt()
    if error_if_nonfinite and not torch.isfinite(total_norm):
        raise RuntimeError(f'The CSLA norm of the gradients is {total_norm.item()}, so they cannot be clipped.')
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total_norm, foreach=foreach)
    return total_norm


def _check_kernels(parameters: Sequence[Tensor], grad_mults: GradMults) -> None:
    kernels = [param for param in parameters if param.ndim == 4]
    if kernels and len(grad_mults) and not any(param in grad_mults for param in kernels):
        raise ValueError(
            f'None of the {len(kernels)} kernels given to clip_grad_norm_ is among the {len(grad_mults)} that have a '
            f'Grad Mult, so that the norm would be the plain one. Make the Grad Mults from the very model whose '
            f'parameters these are, or clip with torch.nn.utils.clip_grad_norm_.'
        )


def _square(grad: Tensor, mult: GradMult) -> Tensor:
    if grad.dtype != mult.taps.dtype:
        # Squares of small float16 gradients are zero in float16.
        grad = grad.to(torch.promote_types(grad.dtype, mult.taps.dtype))
    return mult.multiply(grad).mul_(grad).sum()


def _norms(grads: list[Tensor]) -> list[Tensor]:
    if any(grad.is_sparse for grad in grads):
        raise RuntimeError('clip_grad_norm_ does not support sparse gradients: clip the other parameters.')
    exact = [torch.promote_types(grad.dtype, torch.float32) for grad in grads]
    alike = len(set(exact)) == 1
    return list(torch._foreach_norm(grads, 2, exact[0])) if alike else [grad.double().norm() for grad in grads]
