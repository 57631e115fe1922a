"""RepOptSGD and RepOptAdamW as the equations have them: slow, with dense masks, for tests and for reading."""

from typing import Any

import torch
from torch.optim import SGD, AdamW

from ..reparam import GradMults

__all__ = ['ReferenceRepOptAdamW', 'ReferenceRepOptSGD']


class ReferenceRepOptSGD(SGD):
    """SGD on gradients multiplied with dense Grad Mults; `p.grad` keeps the product."""

    def __init__(self, params: Any, grad_mults: GradMults, **kwargs: Any):
        super().__init__(params, **kwargs)
        self.masks = {param: mult.dense().expand_as(param) for param, mult in grad_mults.items()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = _evaluate(closure)
        for param, mask in self.masks.items():
            if param.grad is not None:
                param.grad *= mask
        super().step()
        return loss


class ReferenceRepOptAdamW(AdamW):
    """AdamW whose moments see the multiplied gradient, and whose update, apart from the decay, is multiplied."""

    def __init__(self, params: Any, grad_mults: GradMults, **kwargs: Any):
        super().__init__(params, **kwargs)
        self.masks = {param: mult.dense().expand_as(param) for param, mult in grad_mults.items()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = _evaluate(closure)
        decay = {p: 1 - group['lr'] * group['weight_decay'] for group in self.param_groups for p in group['params']}
        before = {param: param.clone() for param in self.masks}
        for param, mask in self.masks.items():
            if param.grad is not None:
                param.grad *= mask
        super().step()
        for param, mask in self.masks.items():
            if param.grad is not None:
                decayed = before[param] * decay[param]
                param.copy_(decayed + mask * (param - decayed))
        return loss


def _evaluate(closure: Any) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
