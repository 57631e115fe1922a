"""RepOptSGD: SGD with Grad Mults, which trains a plain model as SGD trains its CSLA counterpart."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from ..reparam import GradMults
from .compiled import compiled, sgd_update
from .grad_mult_optimizer import GradMultOptimizer, gradient, hyperparameter, use_fused
from .sharding import local

__all__ = ['RepOptSGD']


class RepOptSGD(GradMultOptimizer, SGD):
    """SGD that multiplies each kernel's gradient with its Grad Mult, before weight decay and momentum.

    Exactly equivalent to `torch.optim.SGD` on the CSLA network (section 3.3 of arXiv 2205.15242) for any learning rate,
    momentum, Nesterov and dampening, and for weight decay if all branches are decayed.

    Args:
        params: Parameters or groups, as for `torch.optim.SGD`; those without a Grad Mult are updated as usual, also in
            groups that are added later. `fully_shard` may have sharded them.
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
        compiled: Update kernels with code that `torch.compile` makes at the first step: one pass over memory, at the
            price of some seconds and of the compiler that it needs.

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
        compiled: bool = False,
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
        self._take_grad_mults(grad_mults, compiled)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        fresh = [param for param in params if self.state[param].get('momentum_buffer') is None]
        seen = [param for param in params if self.state[param].get('momentum_buffer') is not None]
        for each in fresh if group['momentum'] else ():
            self.state[each]['momentum_buffer'] = torch.zeros_like(each)
        # Torch's kernels take one dampening for a whole list, and nothing dampens a momentum's first step.
        self._step_params({**group, 'dampening': 0.0}, fresh)
        self._step_params(group, seen)

    def _step_params(self, group: dict[str, Any], params: list[Tensor]) -> None:
        plain = [param for param in params if param not in self.grad_mults]
        buffers = [local(self.state[param].get('momentum_buffer')) for param in plain]
        _update(group, [local(param) for param in plain], [gradient(param) for param in plain], buffers)
        kernels = [param for param in params if param in self.grad_mults]
        if self._compiled:
            self._step_compiled(group, kernels)
        else:
            self._step_blocks(group, kernels)

    def _step_blocks(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for blocks in self._row_blocks(params):
            rows = [block.of(block.param) for block in blocks]
            grads = self._multiply(blocks, [block.of(gradient(block.param)) for block in blocks], 'grads')
            buffers = [self.state[block.param].get('momentum_buffer') for block in blocks]
            buffers = [buffer if buffer is None else block.of(buffer) for block, buffer in zip(blocks, buffers)]
            _update(group, rows, grads, buffers)

    def _step_compiled(self, group: dict[str, Any], params: list[Tensor]) -> None:
        names = ('lr', 'momentum', 'dampening', 'weight_decay')
        settings: dict[torch.dtype, dict[str, Tensor]] = {}
        for param in params:
            if param.dtype not in settings:
                settings[param.dtype] = {name: hyperparameter(group[name], param) for name in names}
            compiled(sgd_update)(
                local(param).detach(),
                gradient(param),
                local(self.state[param].get('momentum_buffer')),
                self._mask_parts(param),
                **settings[param.dtype],
                nesterov=group['nesterov'],
                maximize=group['maximize'],
            )


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
