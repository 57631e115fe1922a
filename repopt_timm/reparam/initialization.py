"""The Rule of Initialization (section 3.3 of arXiv 2205.15242), and scales on the convolutions that they are for."""

from typing import Any

import torch
from torch import nn

from .branches import draw_operators, make_branches, merge
from .modules import is_sharded, modules_of, unwrap
from .scales import CarriedScales, Scales
from .twins import ScalesMapping, scales_for

__all__ = ['attach_scales', 'initialize', 'prepare']


def prepare(model: nn.Module, scales: ScalesMapping, init: bool = True) -> nn.Module:
    """Makes a plain model ready for a RepOptimizer: applies the Rule of Initialization and attaches the scales.

    Args:
        model: Any model whose convolutions `scales` names; changed in place.
        scales: Module name to branch name to vector of shape (O,).
        init: Apply the Rule of Initialization; False keeps the weights, for fine-tuning.

    Returns:
        The model.

    Raises:
        ValueError: If the scales do not fit the model, it is a Hyper-Search or CSLA model, or it is sharded.

    Example:
        >>> model = prepare(timm.create_model('resnet18'), Scales.initial(timm.create_model('resnet18')))
    """
    scales = scales_for(model, scales)
    if init:
        initialize(model, scales)
    attach_scales(model, scales, initialized=init)
    return model


def attach_scales(model: nn.Module, scales: ScalesMapping, initialized: bool = False) -> None:
    """Puts scales on a model's convolutions, where the optimizers find them; weights stay as they are.

    Args:
        model: Any model whose convolutions `scales` names.
        scales: Module name to branch name to vector of shape (O,).
        initialized: Remember that the weights come from the Rule of Initialization.

    Raises:
        ValueError: If the scales do not fit the model.
    """
    fitting, convs = _fitting_convs(model, scales)
    for name, conv in convs.items():
        CarriedScales(fitting, name, initialized).put_on(conv)


@torch.no_grad()
def initialize(model: nn.Module, scales: ScalesMapping) -> None:
    """Applies the Rule of Initialization: `W' = sum_b s_b * A_b theta_b` with freshly drawn operators.

    Operators are drawn as in a Hyper-Search, by the start of the scales (`draw_operators`); the identity starts at its
    searched value. Random numbers come from torch's global generator, in the order of the scales' modules.

    Args:
        model: Any model whose convolutions `scales` names; their weights are overwritten in place.
        scales: Module name to branch name to vector of shape (O,).

    Raises:
        ValueError: If the scales do not fit the model, it is a Hyper-Search or CSLA model, or it is sharded.
    """
    fitting, convs = _fitting_convs(model, scales)
    for name, conv in convs.items():
        if is_sharded(conv.weight):
            raise ValueError(
                f"'{name}' of {type(model).__name__} is sharded already, so its kernel cannot be drawn. Prepare the "
                f'model before sharding it with fully_shard.'
            )
    counts = fitting.counts
    for name, conv in convs.items():
        kernel, vectors = conv.weight, fitting[name]
        branches = make_branches(counts[name], conv)
        operators = draw_operators(branches, kernel, vectors, fitting.start)
        kernel.copy_(merge(branches, operators, vectors, kernel.shape))


def _fitting_convs(model: nn.Module, scales: ScalesMapping) -> tuple[Scales, dict[str, Any]]:
    """Returns the scales with the model's geometry, and name to convolution for each that has scales."""
    model = unwrap(model)
    fitting = scales_for(model, scales)
    modules = modules_of(model)
    return fitting, {name: modules[name] for name in fitting}
