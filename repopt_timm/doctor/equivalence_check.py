"""Trains a CSLA network with SGD and its plain twin with RepOptSGD, and compares what comes out."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..models import ensure_registered
from ..names import ModelName
from ..reparam import to_plain
from ..sources import ScalesSource, default_scales, load_scales

__all__ = ['TOLERANCE', 'check_equivalence']

TOLERANCE = 1e-8
"""Larger than what float64 rounds in a short training, smaller than what a wrong Grad Mult does in two steps."""

_CLASSES = 10
_BATCH_SIZE = 8
_SETTINGS: dict[str, Any] = {'lr': 0.01, 'momentum': 0.9, 'weight_decay': 1e-4}


def check_equivalence(
    model_name: str,
    scales: ScalesSource | None = None,
    steps: int = 20,
    img_size: int = 64,
    device: str = 'cpu',
    model_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains both networks side by side from the same start, in float64, on the same random images.

    BatchNorm keeps the statistics of the first batch and dropout is off: both networks are then the same function, and
    what differs is how they are trained.

    Args:
        model_name: Name of a target model, such as `repopt_vgg_a0` or `repopt_resnet18`.
        scales: See `load_scales`. Defaults to the shipped ones of the model, else to the unsearched values.
        steps: Number of steps.
        img_size: Height and width of the images.
        device: Where to.
        model_kwargs: Further arguments of `timm.create_model`.

    Returns:
        `model`, `scales` (their fingerprint), `deviation` (the largest relative difference of a tensor, in the 2-norm)
        and `right`, whether that is within `TOLERANCE`.

    Raises:
        ValueError: If the model cannot be made, the scales are not its own, or the training diverges.
    """
    ensure_registered(model_name)
    name = ModelName.parse(model_name)
    if not timm.is_model(name.of_kind('csla')):
        raise ValueError(
            f"There is no CSLA network of '{model_name}', expected a target such as repopt_vgg_a0, or "
            f"repopt_resnet18 for timm's resnet18."
        )
    kwargs = {'num_classes': _CLASSES, **(model_kwargs or {})}
    torch.manual_seed(0)
    found = load_scales(scales or _default(model_name), timm.create_model(name.of_kind('target'), **kwargs))
    csla: Any = timm.create_model(name.of_kind('csla'), scales=found, **kwargs).to(device, torch.float64)
    channels = kwargs.get('in_chans') or csla.pretrained_cfg['input_size'][0]
    shape = (_BATCH_SIZE, channels, img_size, img_size)
    _freeze_statistics(csla, torch.randn(shape, dtype=torch.float64).to(device))
    plain = to_plain(csla)
    pairs = [(net, create_optimizer_v2(net, rule, **_SETTINGS)) for net, rule in ((csla, 'sgd'), (plain, 'repopt_sgd'))]
    for step in range(steps):
        images = torch.randn(shape, dtype=torch.float64).to(device)
        labels = torch.randint(kwargs['num_classes'], shape[:1]).to(device)
        for net, optimizer in pairs:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
        if not loss.isfinite():
            raise ValueError(
                f'{model_name} diverges in step {step + 1} of {steps} on random images of {img_size} px, which shows '
                f'nothing. Try a larger --img-size.'
            )
    deviation = _deviation(to_plain(csla), plain)
    return {'model': model_name, 'scales': found.fingerprint, 'deviation': deviation, 'right': deviation <= TOLERANCE}


def _default(model_name: str) -> ScalesSource:
    try:
        return default_scales(model_name)
    except ValueError:
        return 'initial'


@torch.no_grad()
def _freeze_statistics(model: nn.Module, images: torch.Tensor) -> None:
    """Gives BatchNorm the statistics of these images, and leaves the model in evaluation mode."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    model.train()(images)
    model.eval()


def _deviation(first: nn.Module, second: nn.Module) -> float:
    other = second.state_dict()
    tensors = [(a.double(), other[name].double()) for name, a in first.state_dict().items() if a.is_floating_point()]
    # Of a tensor, as Python's own would pass over a NaN.
    return torch.stack([(a - b).norm() / b.norm().clamp_min(1e-300) for a, b in tensors]).max().item()
