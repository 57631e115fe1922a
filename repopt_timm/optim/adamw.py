"""RepOptAdamW: AdamW with Grad Mults, which trains a plain model as AdamW trains its CSLA counterpart."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW

from .base import GradMultOptimizer, local

# After the first AdamW is made, torch has wrapped its step in hooks and a profiler; RepOptAdamW's step has its own.
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
        args, kwargs: Parameters or groups, `lr`, `betas`, `eps`, `weight_decay`, `amsgrad`, `maximize`, `foreach`,
            `capturable` and `fused` of `torch.optim.AdamW`, with its defaults; see `RepOptSGD` for `fused` and for
            parameters without a Grad Mult.
        grad_mults: What `make_grad_mults(model, update_rule='adamw')` returned for the model of these parameters.

    Raises:
        ValueError: If the Grad Mults are missing, belong to other parameters or to another update rule, or if a
            trainable kernel that has one is in no group.
    """

    update_rule = 'adamw'

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step; a closure evaluates the model again and returns the loss."""
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
