"""A RepOptimizer for any model and scales, outside of timm's factory."""

from torch import nn

from ..reparam import make_grad_mults, prepare
from ..reparam.initialization import ScalesMapping
from .sgd import RepOptSGD

__all__ = ['build_repopt_sgd']


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
        init: Initialize the weights; False goes on from those that the model has.

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
