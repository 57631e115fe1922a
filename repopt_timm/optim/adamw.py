"""RepOptAdamW: AdamW with Grad Mults, which trains a plain model as AdamW trains its CSLA counterpart."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from ..reparam import GradMults
from .compiled import adamw_update, compiled
from .grad_mult_optimizer import GradMultOptimizer, gradient, hyperparameter, use_fused
from .sharding import local

__all__ = ['RepOptAdamW']


class RepOptAdamW(GradMultOptimizer, AdamW):
    """AdamW that multiplies each kernel's update with its Grad Mult of power 1 (appendix A of arXiv 2205.15242).

    A branch with the scale s sees the gradient times s, and Adam takes its size out again, up to `eps`. Of the branch's
    update, what reaches the kernel is |s| times: the sign appears in gradient and kernel and drops out. The moments see
    the gradient times the Grad Mult too, so that `eps` is compared with gradients as large as the branches'.
    Equivalent to `torch.optim.AdamW` on the CSLA network up to what `eps` does; the decay is exact.

    Args:
        params: Parameters or groups, as for `torch.optim.AdamW`; those without a Grad Mult are updated as usual,
            also in groups that are added later. `fully_shard` may have sharded them.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        amsgrad: Use the maximum of the second moments.
        grad_mults: What `make_grad_mults(model, update_rule='adamw')` returned for the model of these parameters.
        maximize: Maximize instead of minimize.
        foreach: Use torch's multi-tensor implementation.
        differentiable: Let autograd record the step.
        fused: Use torch's fused implementation; the default where there is one, unless `foreach` is given.
        compiled: Update kernels with code that `torch.compile` makes at the first step: one pass over memory, at the
            price of some seconds and of the compiler that it needs.

    Raises:
        ValueError: If the Grad Mults are missing, belong to other parameters or to another update rule.
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
        differentiable: bool = False,
        fused: bool | None = None,
        compiled: bool = False,
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
            differentiable=differentiable,
            fused=fused,
        )
        self._take_grad_mults(grad_mults, compiled)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:
            if not self.state[param]:
                self._init_state(param, group)
        plain = [param for param in params if param not in self.grad_mults]
        states = [{key: local(value) for key, value in self.state[param].items()} for param in plain]
        grads = [gradient(param) for param in plain]
        steps = [state['step'] for state in states]
        _update(group, [local(param) for param in plain], grads, states, steps, group['weight_decay'])
        kernels = [param for param in params if param in self.grad_mults]
        if self._compiled:
            self._step_compiled(group, kernels)
        else:
            self._step_blocks(group, kernels)

    def _init_state(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        by_compiler = self._compiled and param in self.grad_mults
        fused = not by_compiler and use_fused(group, [local(param)], [gradient(param)])
        device = param.device if fused else 'cpu'
        state['step'] = torch.zeros((), dtype=torch.float32, device=device)
        state['exp_avg'] = torch.zeros_like(param)
        state['exp_avg_sq'] = torch.zeros_like(param)
        if group['amsgrad']:
            state['max_exp_avg_sq'] = torch.zeros_like(param)

    def _step_blocks(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for blocks in self._row_blocks(params):
            grads = self._multiply(blocks, [block.of(gradient(block.param)) for block in blocks], 'grads')
            states = []
            for block in blocks:
                state = self.state[block.param]
                states.append({key: block.of(value) for key, value in state.items() if key != 'step'})
            # Each block counts for itself, the kernel's own counter advances once, below.
            steps = [self.state[block.param]['step'].clone() for block in blocks]
            places = self._like(grads, 'updates')
            updates = [torch.zeros_like(grad) if out is None else out.zero_() for grad, out in zip(grads, places)]
            _update(group, updates, grads, states, steps, weight_decay=0.0)
            updates = self._multiply(blocks, updates, 'grads')
            for block, update in zip(blocks, updates):
                block.of(block.param).mul_(1 - group['lr'] * group['weight_decay']).add_(update)
        for param in params:
            self.state[param]['step'] += 1

    def _step_compiled(self, group: dict[str, Any], params: list[Tensor]) -> None:
        settings: dict[tuple[torch.dtype, float], dict[str, Any]] = {}
        for param in params:
            state = self.state[param]
            state['step'] += 1
            key = (param.dtype, state['step'].item())
            if key not in settings:
                settings[key] = _settings(group, param, key[1])
            compiled(adamw_update)(
                local(param).detach(),
                gradient(param),
                local(state['exp_avg']),
                local(state['exp_avg_sq']),
                local(state.get('max_exp_avg_sq')),
                self._mask_parts(param),
                **settings[key],
                maximize=group['maximize'],
            )


def _settings(group: dict[str, Any], param: Tensor, step: float) -> dict[str, Any]:
    values = {name: hyperparameter(group[name], param) for name in ('lr', 'eps', 'weight_decay')}
    betas = [hyperparameter(beta, param) for beta in group['betas']]
    first, second = (1 / (1 - beta**step) for beta in group['betas'])
    corrections = [hyperparameter(first, param), hyperparameter(second**0.5, param)]
    return {**values, 'betas': betas, 'corrections': corrections}


def _update(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    steps: list[Tensor],
    weight_decay: float,
) -> None:
    if not params:
        return
    beta1, beta2 = group['betas']
    adamw(
        params,
        grads,
        [state['exp_avg'] for state in states],
        [state['exp_avg_sq'] for state in states],
        [state['max_exp_avg_sq'] for state in states] if group['amsgrad'] else [],
        steps,
        foreach=group['foreach'],
        fused=use_fused(
            group, params, grads, *([state[name] for state in states] for name in ('exp_avg', 'exp_avg_sq'))
        ),
        differentiable=group['differentiable'],
        amsgrad=group['amsgrad'],
        beta1=beta1,
        beta2=beta2,
        lr=group['lr'],
        weight_decay=weight_decay,
        eps=group['eps'],
        maximize=group['maximize'],
    )
