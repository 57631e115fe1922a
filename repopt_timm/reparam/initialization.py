"""The Rule of Initialization, and the scales that a plain convolution carries (section 3.3 of arXiv 2205.15242)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .branches import Branch, merge
from .vectors import check_vectors, fingerprint_of

__all__ = ['CarriedScales', 'ScalesMapping', 'attach_scales', 'carried_scales', 'initialize', 'scaled_convs']

ScalesMapping = Mapping[str, Mapping[str, Tensor]]

_ATTRIBUTE = 'repopt_scales'


@dataclass(frozen=True)
class CarriedScales:
    """The scales of one convolution, kept on the module as a plain attribute.

    A module's attribute survives copies, pickling, renaming, wrapping and casts, where a parameter's attribute, its
    position or a buffer's dtype would not.

    Attributes:
        vectors: Branch name to float32 vector of shape (O,).
        fingerprint: Identifies the scales of the whole network that these belong to.
        initialized: Whether the convolution's weight came from the Rule of Initialization.
    """

    vectors: dict[str, Tensor]
    fingerprint: str
    initialized: bool = False


def scaled_convs(model: nn.Module, scales: ScalesMapping) -> list[tuple[str, nn.Conv2d]]:
    """Finds the convolutions that `scales` names, and checks that the scales fit them.

    Raises:
        ValueError: If a named module is missing or no `nn.Conv2d`, or a vector does not fit it.
    """
    modules = dict(model.named_modules())
    source = getattr(scales, 'source', '')
    found = []
    for name, vectors in scales.items():
        conv = modules.get(name)
        if not isinstance(conv, nn.Conv2d):
            kind = 'has no such module' if conv is None else f'has a {type(conv).__name__} there'
            raise ValueError(
                f"{source or 'The scales'} name a convolution '{name}', but {type(model).__name__} {kind}. Scales go "
                f'by module name: use those that were searched for this architecture.'
            )
        for branch in vectors:
            try:
                Branch.of(branch, conv)
            except ValueError as error:
                raise ValueError(f"{source or 'Scales'}: module '{name}': {error}") from None
        check_vectors(name, vectors, conv.out_channels, source=source)
        found.append((name, conv))
    return found


def attach_scales(model: nn.Module, scales: ScalesMapping, initialized: bool = False) -> None:
    """Puts scales on a model's convolutions, where the optimizers find them; weights stay as they are.

    Args:
        model: Any model whose convolutions `scales` names.
        scales: Module name to branch name to vector of shape (O,).
        initialized: Remember that the weights come from the Rule of Initialization.

    Raises:
        ValueError: If the scales do not fit the model.
    """
    identity = fingerprint_of(scales)
    for name, conv in scaled_convs(model, scales):
        vectors = {branch: vector.detach().to('cpu', torch.float32).clone() for branch, vector in scales[name].items()}
        setattr(conv, _ATTRIBUTE, CarriedScales(vectors, identity, initialized))


def carried_scales(model: nn.Module) -> dict[str, CarriedScales]:
    """Collects the scales that the convolutions of a model carry, by module name."""
    return {name: getattr(module, _ATTRIBUTE) for name, module in model.named_modules() if hasattr(module, _ATTRIBUTE)}


@torch.no_grad()
def initialize(model: nn.Module, scales: ScalesMapping) -> None:
    """Applies the Rule of Initialization: `W' = sum_b s_b * A_b theta_b` with freshly drawn operators.

    Operators get PyTorch's default initialization, as in a Hyper-Search; the identity starts at its searched value.
    Random numbers come from torch's global generator, in the order of the model's modules.

    Args:
        model: Any model whose convolutions `scales` names; their weights are overwritten in place.
        scales: Module name to branch name to vector of shape (O,).

    Raises:
        ValueError: If the scales do not fit the model.
    """
    for name, conv in scaled_convs(model, scales):
        branches = [Branch.of(branch, conv) for branch in sorted(scales[name])]
        operators = {}
        for branch in branches:
            operator = branch.operator(conv, device=conv.weight.device, dtype=conv.weight.dtype).weight
            if not branch.scaled:
                operator.copy_(scales[name][branch.name].view(-1, 1, 1, 1))
            operators[branch.name] = operator
        conv.weight.copy_(merge(branches, operators, scales[name], conv.weight.shape))
