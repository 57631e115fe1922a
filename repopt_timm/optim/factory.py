"""Makes the RepOptimizers part of timm's optimizer factory; the only file that touches its registry."""

import warnings
import weakref
from typing import Any

import torch
from timm.optim import OptimInfo
from timm.optim._optim_factory import OptimizerRegistry, default_registry
from torch import nn

from ..reparam import carried_scales, make_grad_mults
from .adamw import RepOptAdamW
from .sgd import RepOptSGD

__all__ = ['register_optimizers']

_OPTIMIZERS = {
    'repoptsgd': OptimInfo(
        name='repoptsgd',
        opt_class=RepOptSGD,
        description='SGD with Grad Mults from searched scales (Nesterov)',
        has_eps=False,
        has_momentum=True,
        defaults={'nesterov': True},
    ),
    'repoptadamw': OptimInfo(
        name='repoptadamw',
        opt_class=RepOptAdamW,
        description='AdamW with Grad Mults from searched scales',
        has_betas=True,
    ),
}
_UPDATE_RULES = {'repoptsgd': RepOptSGD.update_rule, 'repoptadamw': RepOptAdamW.update_rule}
_ALIASES = {'repopt_sgd': 'repoptsgd', 'repopt_adamw': 'repoptadamw'}


class _RepOptRegistry(OptimizerRegistry):
    """timm's registry, with the model in hand: a RepOptimizer needs the scales that its convolutions carry."""

    def create_optimizer(  # type: ignore[override]
        self, model_or_params: Any, opt: str, **kwargs: Any
    ) -> torch.optim.Optimizer:
        # timm takes what follows the last '_' for the optimizer's name, which would make plain SGD of 'repopt_sgd'.
        name = opt.lower()
        for alias, target in _ALIASES.items():
            if name in (alias, f'lookahead_{alias}'):
                name = name.replace(alias, target)
        optimizer = name.removeprefix('lookahead_')
        if isinstance(model_or_params, nn.Module):
            if optimizer in _UPDATE_RULES:
                if kwargs.get('grad_mults') is None:
                    kwargs['grad_mults'] = make_grad_mults(model_or_params, update_rule=_UPDATE_RULES[optimizer])
            else:
                _warn_of_unused_scales(model_or_params, opt)
        return super().create_optimizer(model_or_params, name, **kwargs)


def register_optimizers() -> None:
    """Registers the RepOptimizers with timm; safe to call again."""
    for name, info in _OPTIMIZERS.items():
        default_registry._optimizers[name] = info
    for alias, target in _ALIASES.items():
        default_registry.register_alias(alias, target)
    # Other modules hold this very object, so it changes its class instead of being replaced.
    default_registry.__class__ = _RepOptRegistry


_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _warn_of_unused_scales(model: nn.Module, opt: str) -> None:
    if model not in _warned and any(carried.initialized for carried in carried_scales(model).values()):
        _warned.add(model)
        warnings.warn(
            f"The model was initialized from scales, but the optimizer '{opt}' has no Grad Mults, so that it does not "
            f"train like its CSLA counterpart. Use opt='repopt_sgd' or 'repopt_adamw', or create the model without "
            f'scales.',
            stacklevel=4,
        )
