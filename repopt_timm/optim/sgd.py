"""RepOptSGD: SGD with Grad Mults, which trains a plain model as SGD trains its CSLA counterpart."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from ..reparam import make_grad_mults, prepare
from ..reparam.scales import ScalesMapping
from .base import GradMultOptimizer

# After the first SGD is made, torch has wrapped `SGD.step` in hooks and a profiler; RepOptSGD's step has its own.
_sgd_step = inspect.unwrap(SGD.step)


class RepOptSGD(GradMultOptimizer, SGD):
    """SGD that multiplies each kernel's gradient with its Grad Mult, before weight decay and momentum.

    Exactly equivalent to `torch.optim.SGD` on the CSLA network (section 3.3 of arXiv 2205.15242) for any learning rate,
    momentum, Nesterov and dampening, and for weight decay if all branches are decayed.

    After `step`, `p.grad` of a kernel holds the product, as torch's fused kernels leave unscaled gradients in it.

    Args:
        args, kwargs: Parameters or groups, `lr`, `momentum`, `dampening`, `weight_decay`, `nesterov`, `maximize`,
            `foreach` and `fused` of `torch.optim.SGD`, with its defaults. Parameters without a Grad Mult are updated as
            usual, also in groups that are added later. `fully_shard` may have sharded them. `fused` is the default on a
            CPU and on CUDA, unless `foreach` or `dampening` is given, parameters are sharded, or they are in half
            precision on a CPU, where torch before 2.14 leaves them unchanged.
        grad_mults: What `make_grad_mults(model)` returned for the model whose parameters these are.

    Raises:
        ValueError: If the Grad Mults are missing, belong to other parameters or to another update rule, or if a
            trainable kernel that has one is in no group.

    Example:
        >>> optimizer = RepOptSGD(model.parameters(), lr=0.1, momentum=0.9, grad_mults=make_grad_mults(model))
    """

    update_rule = 'sgd'

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step; a closure evaluates the model again and returns the loss."""
        loss = self._evaluate(closure)
        self._multiply()
        for group in self.param_groups:
            for param in group['params'] if group['fused'] and group['momentum'] and not group['dampening'] else ():
                # Torch's fused kernels fail if a parameter has its first gradient later than others.
                if param.grad is not None and self.state[param].get('momentum_buffer') is None:
                    self.state[param]['momentum_buffer'] = torch.zeros_like(param)
        _sgd_step(self)
        return loss


def build_repopt_sgd(
    model: nn.Module,
    scales: ScalesMapping,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 4e-5,
    init: bool = True,
) -> RepOptSGD:
    """Applies the Rule of Initialization to a model and makes the RepOptSGD that trains it.

    Nesterov momentum; the weight decay goes to 4-D parameters alone. timm's grouping, which
    `timm.optim.create_optimizer_v2(model, 'repopt_sgd')` uses, also decays the classifier.

    Args:
        model: Any model whose convolutions `scales` names.
        scales: Module name to branch name to vector of shape (O,), such as `load_scales` returns.
        lr: Learning rate.
        momentum: Momentum factor.
        weight_decay: L2 penalty.
        init: Replace the kernels by new ones; False keeps the model's own, trained ones for example.

    Returns:
        The optimizer, of all parameters that require gradients.

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
    return RepOptSGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, grad_mults=make_grad_mults(model))
