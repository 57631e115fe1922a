"""Makes the RepOptimizers part of timm's optimizer factory; the only file that touches its registry."""

import warnings
from typing import Any

import torch
from timm.optim import OptimInfo
from timm.optim._optim_factory import OptimizerRegistry, default_registry
from torch import nn

from ..reparam import carried_scales, make_grad_mults
from .adamw import RepOptAdamW
from .sgd import RepOptSGD

_OPTIMIZERS = (
    OptimInfo(
        name='repoptsgd',
        opt_class=RepOptSGD,
        description='SGD with Grad Mults from searched scales (Nesterov)',
        has_eps=False,
        has_momentum=True,
        defaults={'nesterov': True},
    ),
    OptimInfo(
        name='repoptadamw',
        opt_class=RepOptAdamW,
        description='AdamW with Grad Mults from searched scales',
        has_betas=True,
    ),
)


class _RepOptRegistry(OptimizerRegistry):
    """timm's registry, with the model in hand: a RepOptimizer needs the scales that its convolutions carry."""

    def create_optimizer(  # type: ignore[override]
        self, model_or_params: Any, opt: str, **kwargs: Any
    ) -> torch.optim.Optimizer:
        # timm takes what follows the last '_' for the optimizer's name, which would make plain SGD of 'repopt_sgd'.
        opt = opt.lower().replace('repopt_', 'repopt')
        update_rule = getattr(self.get_optimizer_info(opt.rpartition('_')[2]).opt_class, 'update_rule', None)
        if isinstance(model_or_params, nn.Module):
            if update_rule is None:
                _warn_of_unused_scales(model_or_params, opt)
            elif kwargs.get('grad_mults') is None:
                kwargs['grad_mults'] = make_grad_mults(model_or_params, update_rule=update_rule)
        return super().create_optimizer(model_or_params, opt, **kwargs)


def register_optimizers() -> None:
    """Registers the RepOptimizers with timm."""
    for info in _OPTIMIZERS:
        default_registry.register(info)
        default_registry.register_alias(info.name.replace('repopt', 'repopt_'), info.name)
    # Other modules hold this very object, so it changes its class instead of being replaced.
    default_registry.__class__ = _RepOptRegistry


def _warn_of_unused_scales(model: nn.Module, opt: str) -> None:
    if any(carried.initialized for carried in carried_scales(model).values()):
        warnings.warn(
            f"The model was initialized from scales, but the optimizer '{opt}' has no Grad Mults: the model does not "
            f"train like its CSLA counterpart. Use opt='repopt_sgd' or 'repopt_adamw', or create the model without "
            f'scales.',
            stacklevel=4,
        )
