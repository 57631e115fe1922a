"""The CSLA convolution: an `nn.Conv2d` whose kernel is the sum of its branches (section 3.2 of arXiv 2205.15242)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .branches import Branch, draw_operators, merge
from .modules import whole


class Branches(nn.Module):
    """Makes a kernel of trainable operators and their scales; a parametrization of `nn.Conv2d.weight`.

    Adding up the kernels before one convolution gives the same function and the same gradients as adding up the
    branches' outputs, without their activations. The operator of the branch `kxk` is the parametrization's `original`.
    Scales are parameters in a Hyper-Search, else buffers, which stay float32 whatever dtype the network is cast to.
    Until they have values (`complete`) the kernel cannot be made.
    """

    def __init__(
        self,
        kernel: Tensor,
        branches: Sequence[Branch],
        operators: Mapping[str, Tensor],
        vectors: Mapping[str, Tensor] | None,
        trainable: bool,
        start: str,
    ):
        super().__init__()
        self.branches = tuple(branches)
        self.shape = tuple(kernel.shape)
        self.trainable = trainable
        self.start = start
        self.complete = vectors is not None
        self.operators = nn.ParameterDict()
        self.scales = nn.Module()
        for branch in branches:
            if branch.name != 'kxk':
                self.operators[branch.name] = nn.Parameter(operators[branch.name], kernel.requires_grad)
            if branch.scaled:
                vector = torch.full(kernel.shape[:1], float('nan')) if vectors is None else vectors[branch.name].clone()
                if trainable:
                    parameter = nn.Parameter(vector.to(kernel.device, kernel.dtype), kernel.requires_grad)
                    self.scales.register_parameter(branch.name, parameter)
                else:
                    self.scales.register_buffer(branch.name, vector.to(kernel.device))

    @property
    def counts(self) -> dict[str, int]:
        """Branch name to number of equal branches."""
        return {branch.name: branch.count for branch in self.branches}

    def vectors(self) -> dict[str, Tensor]:
        """Returns branch name to scale of shape (O,); an identity's entry is what its operator has learned."""
        self._check_complete()
        tensors = {
            each.name: getattr(self.scales, each.name) if each.scaled else self.operators[each.name]
            for each in self.branches
        }
        return {name: whole(tensor).detach().flatten() for name, tensor in tensors.items()}

    def forward(self, kxk: Tensor) -> Tensor:
        """Returns the merged kernel (O, I/g, k_h, k_w); the operator `kxk` has the shape (n O, I/g, k_h, k_w)."""
        self._check_complete()
        scales = {each.name: getattr(self.scales, each.name) for each in self.branches if each.scaled}
        return merge(self.branches, {'kxk': kxk, **self.operators}, scales, self.shape)

    def _check_complete(self) -> None:
        if not self.complete:
            raise ValueError('This CSLA convolution has no scales yet: create the model with scales=... or load some.')

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._check_complete()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        names = [f'{prefix}scales.{branch.name}' for branch in self.branches if branch.scaled]
        self.complete = self.complete or all(name in state_dict for name in names)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'Branches':
        constants = dict(self.scales.named_buffers())
        super()._apply(fn, recurse)
        for name, constant in constants.items():
            moved = getattr(self.scales, name)
            if constant.is_meta and not moved.is_meta:
                # Uninitialized memory could pass for scales.
                self.complete = False
            # A cast would round the constants.
            exact = moved.float() if constant.is_meta else constant.to(moved.device)
            setattr(self.scales, name, exact)
        return self


def add_branches(
    conv: nn.Conv2d,
    branches: Sequence[Branch],
    vectors: Mapping[str, Tensor] | None,
    trainable: bool,
    start: str = 'paper',
) -> None:
    """Makes a CSLA convolution of a plain one, in place; without vectors a state dict has to bring the scales."""
    kernel = conv.weight
    operators = draw_operators(branches, kernel, vectors, start)
    made = Branches(kernel, branches, operators, vectors, trainable, start)
    conv.weight = nn.Parameter(operators['kxk'], kernel.requires_grad)
    # Unsafe: the operator of n equal branches has n times the rows of the kernel.
    parametrize.register_parametrization(conv, 'weight', made, unsafe=True)


def merge_branches(conv: nn.Conv2d) -> None:
    """Makes a CSLA convolution plain again, in place, with the merged kernel."""
    original: Any = conv.parametrizations
    kernel = nn.Parameter(conv.weight.detach(), original['weight'].original.requires_grad)
    bias = conv._parameters.pop('bias')
    # Copies of a module share its class. `remove_parametrizations` would take the property `weight` off all of them.
    conv.__class__ = parametrize.type_before_parametrizations(conv)
    del conv.parametrizations
    conv.weight = kernel
    conv.register_parameter('bias', bias)


def branches_of(conv: nn.Module) -> Branches | None:
    """Returns the branches of a CSLA convolution; None for any other module."""
    if parametrize.is_parametrized(conv, 'weight'):
        parametrizations: Any = conv.parametrizations
        return next((each for each in parametrizations['weight'] if isinstance(each, Branches)), None)
    return None


def kind_of(model: nn.Module) -> str:
    """Returns `hs` for a Hyper-Search model, `csla` for one with constant scales, `target` for a plain one."""
    found = [module for module in model.modules() if isinstance(module, Branches)]
    if not found:
        return 'target'
    return 'hs' if any(branches.trainable for branches in found) else 'csla'
