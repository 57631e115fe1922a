"""RepOptSGD: SGD with Grad Mults, which trains a plain model as SGD trains its CSLA counterpart."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.optimizer import ParamsT, _use_grad_for_differentiable
from torch.optim.sgd import sgd

from ..reparam import GradMults
from .grad_mult_optimizer import GradMultOptimizer, gradient, row_blocks, use_fused

__all__ = ['RepOptSGD']


class RepOptSGD(GradMultOptimizer, SGD):
    """SGD that multiplies each kernel's gradient with its Grad Mult, before weight decay and momentum.

    Exactly equivalent to `torch.optim.SGD` on the CSLA network (section 3.3 of arXiv 2205.15242) for any learning rate,
    momentum, Nesterov and dampening, and for weight decay if all branches are decayed.

    Args:
        params: Parameters or groups, as for `torch.optim.SGD`; those without a Grad Mult are updated as usual, also in
            groups that are added later.
        lr: Learning rate.
        momentum: Momentum factor.
        dampening: Dampening of the momentum.
        weight_decay: L2 penalty.
        nesterov: Nesterov momentum.
        grad_mults: What `make_grad_mults(model)` returned for the model whose parameters these are.
        maximize: Maximize instead of minimize.
        foreach: Use torch's multi-tensor implementation.
        differentiable: Let autograd record the step.
        fused: Use torch's fused implementation; the default where there is one, unless `foreach` is given.

    Raises:
        ValueError: If the Grad Mults are missing, belong to other parameters or to another update rule.

    Example:
        >>> optimizer = RepOptSGD(model.parameters(), lr=0.1, momentum=0.9, grad_mults=make_grad_mults(model))
    """

    update_rule = 'sgd'

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        grad_mults: GradMults | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ):
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._take_grad_mults(grad_mults)

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step; gradients stay as they are.

        Args:
            closure: Evaluates the model again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group['params'] if param.grad is not None]
            fresh = [param for param in params if self.state[param].get('momentum_buffer') is None]
            # torch's kernels take a whole list to be at its first step, or none of it.
            self._step_plain(group, [param for param in fresh if param not in self.grad_mults])
            self._step_blocks(group, [param for param in fresh if param in self.grad_mults], first=True)
            seen = [param for param in params if param not in set(fresh)]
            self._step_plain(group, [param for param in seen if param not in self.grad_mults])
            self._step_blocks(group, [param for param in seen if param in self.grad_mults], first=False)
        return loss

    def _step_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        buffers = [self.state[param].get('momentum_buffer') for param in params]
        _update(group, params, [gradient(param) for param in params], buffers)
        if group['momentum']:
            for param, buffer in zip(params, buffers):
                self.state[param]['momentum_buffer'] = buffer

    def _step_blocks(self, group: dict[str, Any], params: list[Tensor], first: bool) -> None:
        if first and group['momentum']:
            for param in params:
                self.state[param]['momentum_buffer'] = torch.empty_like(param)
        for blocks in row_blocks(params, self.grad_mults):
            rows = [block.of(block.param) for block in blocks]
            grads = [block.mult.multiply(block.of(gradient(block.param))) for block in blocks]
            buffers: list[Tensor | None] = [None] * len(blocks)
            if not first:
                buffers = [block.of(self.state[block.param]['momentum_buffer']) for block in blocks]
            _update(group, rows, grads, buffers)
            for block, buffer in zip(blocks, buffers):
                if first and buffer is not None:
                    block.of(self.state[block.param]['momentum_buffer']).copy_(buffer)


def _update(group: dict[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None]) -> None:
    sgd(
        params,
        grads,
        buffers,
        has_sparse_grad=any(grad.is_sparse for grad in grads),
        foreach=group['foreach'],
        fused=use_fused(group, params, grads, buffers),
        weight_decay=group['weight_decay'],
        momentum=group['momentum'],
        lr=group['lr'],
        dampening=group['dampening'],
        nesterov=group['nesterov'],
        maximize=group['maximize'],
    )
