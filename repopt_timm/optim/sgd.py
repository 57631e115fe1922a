"""RepOptSGD: SGD with Grad Mults, which trains a plain model as SGD trains its CSLA counterpart."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from ..reparam import GradMult, GradMults, make_grad_mults, prepare
from ..reparam.initialization import ScalesMapping
from .base import GradMultOptimizer, Update, as_scalars, gradient, gradients
from .chunks import multiply
from .compiled import compiled, sgd_updates
from .sharding import local

__all__ = ['RepOptSGD', 'build_repopt_sgd']


class RepOptSGD(GradMultOptimizer, SGD):
    """SGD that multiplies each kernel's gradient with its Grad Mult, before weight decay and momentum.

    `ReferenceRepOptSGD` in `reference.py` does the same in ten lines; read it first.

    Exactly equivalent to `torch.optim.SGD` on the CSLA network (section 3.3 of arXiv 2205.15242) for any learning rate,
    momentum, Nesterov and dampening, and for weight decay if all branches are decayed.

    A step works in memory of 9 * 2^17 elements on a CPU, 2^25 on CUDA.

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
        fused: Use torch's fused implementation; the default on devices that have one, unless `foreach` is given. On a
            CPU half-precision parameters go without: torch's before 2.14 does not update them.
        compiled: Update kernels with code that `torch.compile` makes at the first step: one graph, one pass over
            memory, at the price of 10 to 30 s and of the compiler that it needs.
        dense: Keep Grad Mults as masks of the kernels' size: as much memory as the kernels, and few launches on CUDA.

    Raises:
        ValueError: If the Grad Mults are missing, belong to other parameters or to another update rule, or if a
            trainable kernel that has one is in no group.

    Example:
        >>> optimizer = RepOptSGD(model.parameters(), lr=0.1, momentum=0.9, grad_mults=make_grad_mults(model))
    """

    update_rule = 'sgd'
    _places = 1
    _not_fused: ClassVar[dict[str, tuple[torch.dtype, ...]]] = {'cpu': (torch.bfloat16, torch.float16)}
    _settings = ('lr', 'momentum', 'dampening', 'weight_decay', 'nesterov', 'maximize', 'foreach')
    _compiler_settings: ClassVar[dict[str, Any]] = {'foreach': True, 'fused': False}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        grad_mults: GradMults | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        compiled: bool = False,
        dense: bool = False,
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
        self._set_up(grad_mults, compiled, dense)

    def _updates_of(self, settings: dict[str, Any], params: list[Tensor], whole: bool) -> list[Update]:
        fresh: set[Tensor] = set()
        if settings['momentum'] != 0:
            fresh = {param for param in params if self.state[param].get('momentum_buffer') is None}
            for param in fresh:
                self.state[param]['momentum_buffer'] = torch.zeros_like(param)
        # Torch's kernels take one dampening for a whole list, and nothing dampens a momentum's first step.
        return [
            *self._updates_alike({**settings, 'dampening': 0.0}, [param for param in params if param in fresh], whole),
            *self._updates_alike(settings, [param for param in params if param not in fresh], whole),
        ]

    def _updates_alike(self, settings: dict[str, Any], params: list[Tensor], whole: bool) -> list[Update]:
        def buffer(param: Tensor) -> Tensor | None:
            return self._state_of(param, 'momentum_buffer')

        plain = [param for param in params if param not in self.grad_mults]
        grads = gradients(plain, settings['fused'])
        updates: list[Update] = [(_update, (settings, list(map(local, plain)), grads, list(map(buffer, plain))))]
        for chunk in self._chunks(params, whole):
            kernels, grads, buffers = (chunk.each(get) for get in (local, gradient, buffer))
            if self._compiled:
                parts = [self._parts_of(rows.param) for rows in chunk.rows]
                names = ('lr', 'momentum', 'dampening', 'weight_decay')
                scalars = as_scalars({name: settings[name] for name in names}, kernels[0])
                scalars.update(nesterov=settings['nesterov'], maximize=settings['maximize'])
                kernels = [kernel.detach() for kernel in kernels]
                updates.append((compiled(sgd_updates), (kernels, grads, buffers, parts, scalars)))
            else:
                arguments = (settings, kernels, grads, buffers, chunk.mults, *chunk.places)
                updates.append((_update_kernels, arguments))
        return updates


def _update_kernels(
    settings: dict[str, Any],
    kernels: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor | None],
    mults: list[GradMult],
    place: list[Tensor] | None = None,
) -> None:
    _update(settings, kernels, multiply(mults, grads, place), buffers)


def _update(settings: dict[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None]) -> None:
    if params:
        sgd(params, grads, buffers, has_sparse_grad=any(grad.is_sparse for grad in grads), **settings)


def build_repopt_sgd(
    model: nn.Module,
    scales: ScalesMapping,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 4e-5,
    init: bool = True,
) -> RepOptSGD:
    """Applies the Rule of Initialization to a model and makes the RepOptSGD that trains it.

    Nesterov momentum; the weight decay goes to 4-D weights alone, that is, to convolutions. timm's grouping, which
    `timm.optim.create_optimizer_v2(model, 'repopt_sgd')` uses, also decays the classifier.

    Args:
        model: Any model whose convolutions `scales` names.
        scales: Module name to branch name to vector of shape (O,).
        lr: Learning rate.
        momentum: Momentum factor.
        weight_decay: L2 penalty.
        init: Initialize the weights; False keeps the model's own.

    Raises:
        ValueError: If the scales do not fit the model.

    Example:
        >>> model = timm.create_model('repopt_vgg_a0', num_classes=10)
        >>> optimizer = build_repopt_sgd(model, Scales.initial(model), lr=0.1)
    """
    prepare(model, scales, init)
    params = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {'params': [param for param in params if param.ndim == 4], 'weight_decay': weight_decay},
        {'params': [param for param in params if param.ndim != 4], 'weight_decay': 0.0},
    ]
    return RepOptSGD(groups, lr=lr, momentum=momentum, nesterov=True, grad_mults=make_grad_mults(model))
