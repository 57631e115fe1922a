"""The Rule of Initialization (section 3.3 of arXiv 2205.15242), and scales on the convolutions that they are for."""

from typing import Any

import torch
from torch import nn

from .branches import draw_operators, make_branches, merge
from .convolution import branches_of
from .modules import is_sharded, modules_of, unwrap
from .scales import CarriedScales, ScalesMapping, scales_for


@torch.no_grad()
def prepare(model: nn.Module, scales: ScalesMapping, init: bool = True) -> nn.Module:
    """Makes a plain model ready for a RepOptimizer: applies the Rule of Initialization and attaches the scales.

    Kernels become `W' = sum_b s_b * A_b theta_b` with freshly drawn operators, by the start of the scales
    (`draw_operators`); the identity starts at its searched value. Random numbers come from torch's global generator, in
    the order of the model's modules. The optimizers find the scales on the convolutions.

    Args:
        model: Any model whose convolutions `scales` names; changed in place.
        scales: Module name to branch name to vector of shape (O,).
        init: Apply the Rule of Initialization; False keeps the weights, for fine-tuning.

    Returns:
        The model.

    Raises:
        ValueError: If the scales do not fit the model, it is a Hyper-Search or CSLA model, or it is to be initialized
            and is sharded.

    Example:
        >>> model = prepare(timm.create_model('resnet18'), Scales.initial(timm.create_model('resnet18')))
    """
    scales = scales_for(model, scales)
    modules: dict[str, Any] = modules_of(unwrap(model))
    for name in scales:
        if branches_of(modules[name]):
            raise ValueError(f"'{name}' of {type(model).__name__} is a CSLA convolution. Prepare the plain model.")
        if init and is_sharded(modules[name].weight):
            raise ValueError(f"'{name}' of {type(model).__name__} is sharded already. Prepare it before fully_shard.")
    counts = scales.counts
    for name, vectors in scales.items():
        conv = modules[name]
        if init:
            branches = make_branches(counts[name], conv)
            operators = draw_operators(branches, conv.weight, vectors, scales.start)
            conv.weight.copy_(merge(branches, operators, vectors, conv.weight.shape))
        CarriedScales(scales, name, initialized=init).put_on(conv)
    return model
