"""RepOptAdamW: AdamW with Grad Mults, which trains a plain model as AdamW trains its CSLA counterpart."""

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from ..reparam import GradMult, GradMults
from .base import GradMultOptimizer, Update, as_scalars, gradient, gradients
from .chunks import add_multiples, multiply
from .compiled import MaskParts, adamw_updates, compiled
from .sharding import local

__all__ = ['RepOptAdamW']

_MOMENTS = ('exp_avg', 'exp_avg_sq', 'max_exp_avg_sq')


class RepOptAdamW(GradMultOptimizer, AdamW):
    """AdamW that multiplies each kernel's update with its Grad Mult of power 1 (appendix A of arXiv 2205.15242).

    `ReferenceRepOptAdamW` in `reference.py` does the same in twenty lines; read it first.

    A branch with the scale s sees the gradient times s, and Adam takes its size out again, up to `eps`. Of the branch's
    update, what reaches the kernel is |s| times: the sign appears in gradient and kernel and drops out. The moments see
    the gradient times the Grad Mult too, so that `eps` is compared with gradients as large as the branches'.
    Equivalent to `torch.optim.AdamW` on the CSLA network up to what `eps` does; the decay is exact.

    A step works in memory of 9 * 2^17 elements on a CPU, 2^25 on CUDA.

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
        capturable: Keep step counters on the parameters' device, so that a CUDA graph can hold a step.
        differentiable: Let autograd record the step.
        fused: Use torch's fused implementation; the default on devices that have one, unless `foreach` is given.
        compiled: Update kernels with code that `torch.compile` makes at the first step: one graph, one pass over
            memory, at the price of 10 to 30 s and of the compiler that it needs.
        dense: Keep Grad Mults as masks of the kernels' size: as much memory as the kernels, and few launches on CUDA.

    Raises:
        ValueError: If the Grad Mults are missing, belong to other parameters or to another update rule, or if a
            trainable kernel that has one is in no group.
    """

    update_rule = 'adamw'
    _places = 2
    _settings = (
        'lr',
        'betas',
        'eps',
        'weight_decay',
        'amsgrad',
        'maximize',
        'foreach',
        'capturable',
        'differentiable',
    )
    _compiler_settings: ClassVar[dict[str, Any]] = {'foreach': True, 'fused': False, 'capturable': True}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        grad_mults: GradMults | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        compiled: bool = False,
        dense: bool = False,
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
            differentiable=differentiable,
            fused=fused,
        )
        self._set_up(grad_mults, compiled, dense)

    def _updates_of(self, settings: dict[str, Any], params: list[Tensor], whole: bool) -> list[Update]:
        if any(gradient(param).is_sparse for param in params):
            raise RuntimeError('RepOptAdamW does not support sparse gradients; torch.optim.SparseAdam does.')
        for param in params:
            if not self.state[param]:
                self._init_state(param, settings)
        plain = [param for param in params if param not in self.grad_mults]
        moments = [[self._state_of(param, name) for param in plain] for name in self._moments(settings)]
        steps = [self.state[param]['step'] for param in plain]
        grads = gradients(plain, settings['fused'])
        updates: list[Update] = [(_update, (settings, list(map(local, plain)), grads, moments, steps))]
        for chunk in self._chunks(params, whole):
            moments = [chunk.each(functools.partial(self._state_of, name=name)) for name in self._moments(settings)]
            kernels, grads = chunk.each(local), chunk.each(gradient)
            steps = [self.state[rows.param]['step'] for rows in chunk.rows]
            if self._compiled:
                parts = [self._parts_of(rows.param) for rows in chunk.rows]
                kernels = [kernel.detach() for kernel in kernels]
                updates.append((_update_compiled, (settings, kernels, grads, moments, steps, parts)))
            else:
                # Each of the rows counts for itself, and only the last of them for the kernel.
                steps = [step if rows.is_last else step.clone() for rows, step in zip(chunk.rows, steps)]
                arguments = (settings, kernels, grads, moments, steps, chunk.mults, *chunk.places)
                updates.append((_update_kernels, arguments))
        return updates

    def _moments(self, settings: dict[str, Any]) -> tuple[str, ...]:
        return _MOMENTS if settings['amsgrad'] else _MOMENTS[:2]

    def _init_state(self, param: Tensor, settings: dict[str, Any]) -> None:
        state = self.state[param]
        state['step'] = torch.zeros((), dtype=torch.float32, device=self._step_device(settings, param))
        for name in self._moments(settings):
            state[name] = torch.zeros_like(param)


def _update_compiled(
    settings: dict[str, Any],
    kernels: list[Tensor],
    grads: list[Tensor],
    moments: list[list[Tensor]],
    steps: list[Tensor],
    parts: list[MaskParts],
) -> None:
    torch._foreach_add_(steps, 1)
    dtype = torch.promote_types(kernels[0].dtype, torch.float32)
    corrections = []
    for step in steps:
        # In float32, `1 - beta2**step` loses four digits.
        first, second = (1 / (1 - beta ** step.double()) for beta in settings['betas'])
        corrections.append((first.to(dtype), second.sqrt().to(dtype)))
    scalars = as_scalars({name: settings[name] for name in ('lr', 'eps', 'weight_decay')}, kernels[0])
    scalars['betas'] = [torch.as_tensor(beta, dtype=dtype) for beta in settings['betas']]
    scalars['maximize'] = settings['maximize']
    compiled(adamw_updates)(kernels, grads, moments, corrections, parts, scalars)


def _update_kernels(
    settings: dict[str, Any],
    kernels: list[Tensor],
    grads: list[Tensor],
    moments: list[list[Tensor]],
    steps: list[Tensor],
    mults: list[GradMult],
    place: list[Tensor] | None = None,
    other_place: list[Tensor] | None = None,
) -> None:
    grads = multiply(mults, grads, place)
    # Torch's kernels change parameters: of zeros they make updates.
    updates = [torch.zeros_like(kernel) for kernel in kernels] if other_place is None else other_place
    if other_place is not None:
        torch._foreach_zero_(updates)
    # In float32, `1 - beta2**step` loses four digits, which a compiler's code would work out of the tensor.
    counters = [step.double() for step in steps] if torch.compiler.is_compiling() else steps
    _update({**settings, 'weight_decay': 0.0}, updates, grads, moments, counters)
    if torch.compiler.is_compiling():
        torch._foreach_copy_(steps, counters)
    if settings['weight_decay'] != 0:
        decay = settings['lr'] * settings['weight_decay']
        if settings['found_inf'] is not None:
            # A skipped step does not decay either.
            decay = decay * (1 - settings['found_inf'].to(kernels[0].device, non_blocking=True))
        torch._foreach_mul_(kernels, 1 - decay)
    add_multiples(mults, kernels, updates)


def _update(
    settings: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    moments: list[list[Tensor]],
    steps: list[Tensor],
) -> None:
    if not params:
        return
    exp_avgs, exp_avg_sqs, *max_exp_avg_sqs = moments
    beta1, beta2 = settings['betas']
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs[0] if max_exp_avg_sqs else [],
        steps,
        has_complex=any(param.is_complex() for param in params),
        beta1=beta1,
        beta2=beta2,
        **{name: value for name, value in settings.items() if name != 'betas'},
    )
