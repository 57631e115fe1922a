"""Finds the convolutions in residual blocks by running the network, as such blocks share no class."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..reparam.modules import modules_of


@torch.no_grad()
def residual_convs(model: nn.Module, images: Tensor) -> list[str]:
    """Lists the convolutions that lie on some, not all, of the paths to a sum, in the order of the model's modules.

    Args:
        model: Any network in evaluation mode.
        images: A batch that it runs on, of shape (N, C, H, W); one image is enough.
    """
    convs = {id(each.weight): name for name, each in modules_of(model).items() if isinstance(each, nn.Conv2d)}
    with _Paths(convs) as paths:
        model(images)
    return [name for name in convs.values() if name in paths.beside_a_sum]


class _Paths(TorchDispatchMode):
    """Records the convolutions that each tensor depends on, operator by operator."""

    def __init__(self, convs: dict[int, str]):
        super().__init__()
        self._convs = convs
        self._above: dict[int, set[str]] = {}
        # Kept, so that no later tensor gets the same id.
        self._tensors: list[Tensor] = []
        self.beside_a_sum: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        above = [self._above.get(id(each), set()) for each in given]
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_) and len(above) == 2:
            self.beside_a_sum |= above[0] ^ above[1]
        found = set().union(*above, (self._convs[id(each)] for each in given if id(each) in self._convs))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._above[id(each)] = found
                self._tensors.append(each)
        return result
