"""RepOptAdamW: AdamW with Grad Mults, which trains a plain model as AdamW trains its CSLA counterpart."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.optimizer import ParamsT

from ..reparam import GradMults
from .base import GradMultOptimizer, local

__all__ = ['RepOptAdamW']

# Once there is an AdamW, torch has wrapped its step in hooks and a profiler; RepOptAdamW's step has its own.
_adamw_step = inspect.unwrap(AdamW.step)


class RepOptAdamW(GradMultOptimizer, AdamW):
    """AdamW in the coordinates of the branches: `g <- M g`, `W <- W / M`, a step, `W <- M W`.

    A branch with the scale s sees the gradient times s, and Adam takes its size out again, up to `eps`. The kernel
    receives |s| times the branch's update: the sign appears in gradient and kernel and drops out (appendix A of arXiv
    2205.15242). The moments see the gradient times the Grad Mult too, so that `eps` is compared with gradients as large
    as the branches'. Equivalent to `torch.optim.AdamW` on the CSLA network up to the effect of `eps`; the decay is
    exact.

    After `step`, `p.grad` of a kernel holds the product, as torch's fused kernels leave unscaled gradients in it.

    Args:
        params: Parameters or groups, as for `torch.optim.AdamW`; those without a Grad Mult are updated as usual, also
            in groups that are added later. `fully_shard` may have sharded them.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        amsgrad: Use the maximum of the second moments.
        grad_mults: What `make_grad_mults(model, update_rule='adamw')` returned for the model of these parameters.
        maximize: Maximize instead of minimize.
        foreach: Use torch's multi-tensor implementation.
        capturable: Keep step counters on the parameters' device, so that a CUDA graph can hold a step.
        fused: Use torch's fused implementation; the default on a CPU and on CUDA, unless `foreach` is given. On a CPU
            half-precision parameters go without.

    Raises:
        ValueError: If the Grad Mults are missing, belong to other parameters or to another update rule, or if a
            trainable kernel that has one is in no group.
    """

    update_rule = 'adamw'

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        grad_mults: GradMults | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
    ):
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
        )
        self.take_grad_mults(grad_mults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step.

        Args:
            closure: Evaluates the model again and returns the loss.
        """
        loss = self._evaluate(closure)
        params = self._multiply()
        kernels = [local(param) for param in params]
        divisors = [local(self.grad_mults.divisor(param)) for param in params]
        if kernels:
            torch._foreach_div_(kernels, divisors)
        try:
            _adamw_step(self)
        finally:
            if kernels:
                torch._foreach_mul_(kernels, divisors)
        return loss
