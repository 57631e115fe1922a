"""The models that are compared, and what a step of each does."""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ..architectures import ARCHITECTURES, Architecture
from ..blocks import plain_twin
from ..models import RepOptVgg, make_kind
from ..models.byobnet import RepVgg
from ..names import PREFIX
from ..optim import RepOptSGD
from ..reparam import CSLAConv2d, carried_scales, make_grad_mults, prepare
from ..reporting import take_turns, time_call
from ..scales import Scales
from .settings import PRECISIONS

__all__ = [
    'SeparateBranches',
    'architecture_of',
    'autocast',
    'batch',
    'forward_pass',
    'hyper_search',
    'inference',
    'make_optimizer',
    'memory_format',
    'plain_inference_models',
    'repvgg',
    'separate_branches',
    'synchronized',
    'target',
    'time_in_turns',
    'training_step',
    'twin_models',
]


def architecture_of(model: str) -> Architecture:
    """Returns the architecture of a target model.

    Raises:
        ValueError: If there is no such target model.
    """
    if model not in ARCHITECTURES:
        raise ValueError(f'--model {model}: expected a RepOpt-VGG target, one of {", ".join(ARCHITECTURES)}.')
    return ARCHITECTURES[model]


def target(
    architecture: Architecture, device: torch.device, grad_checkpointing: bool = False, scales: bool = True
) -> RepOptVgg:
    """Makes a RepOpt-VGG target.

    Args:
        architecture: Depths and widths.
        device: Device of the parameters.
        grad_checkpointing: Recompute activations in the backward pass.
        scales: Let the convolutions carry scales, as a RepOptimizer needs them.
    """
    model = RepOptVgg(architecture, 'target', device=device)
    if scales:
        prepare(model, Scales.initial(model))
    if grad_checkpointing:
        model.set_grad_checkpointing()
    return model.to(memory_format=memory_format(device))


def twin_models(model: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Makes the plain twin of a multi-branch network of timm, ready for RepOptSGD, and the network itself.

    Args:
        model: Name of the twin, such as `repopt_mobileone_s0`.
        device: Device of the parameters.

    Raises:
        ValueError: If timm has no such network, or it has no branches.
    """
    name = model.removeprefix(PREFIX)
    if name == model or not timm.is_model(name):
        raise ValueError(
            f'--model {model}: expected a RepOpt-VGG target, one of {", ".join(ARCHITECTURES)}, or the twin of a '
            f"multi-branch network of timm, such as 'repopt_mobileone_s0'."
        )
    branches = timm.create_model(name)
    plain = plain_twin(branches)
    prepare(plain, Scales.initial(plain))
    to: dict[str, Any] = {'device': device, 'memory_format': memory_format(device)}
    return plain.to(**to), branches.to(**to)


def hyper_search(architecture: Architecture, device: torch.device) -> nn.Module:
    """Makes the model whose scales are trained."""
    model = make_kind(RepOptVgg(architecture, 'target', device=device), 'hs', None)
    return model.to(memory_format=memory_format(device))


def repvgg(architecture: Architecture, device: torch.device) -> nn.Module:
    """Makes the RepVGG with these depths and widths: timm's own, if timm has it."""
    return RepVgg(architecture, device=device).to(memory_format=memory_format(device))


class SeparateBranches(nn.Module):
    """A CSLA convolution that runs its branches one by one and adds up their outputs.

    Args:
        conv: The convolution whose parameters it takes over.
    """

    def __init__(self, conv: CSLAConv2d):
        super().__init__()
        self.branches = conv.branches
        self.stride = conv.stride
        self.dilation = conv.dilation
        self.groups = conv.groups

    def _branch(self, name: str, operator: Any, x: Tensor) -> Tensor:
        if name == 'identity':
            return x * operator.weight.view(1, -1, 1, 1)
        padding = [dilation * (size - 1) // 2 for dilation, size in zip(self.dilation, operator.weight.shape[2:])]
        y = F.conv2d(x, operator.weight, None, self.stride, padding, self.dilation, self.groups)
        return y * operator.scale.view(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = [self._branch(name, operator, x) for name, operator in self.branches.items()]
        return sum(others, first)


def separate_branches(model: nn.Module) -> nn.Module:
    """Copies a Hyper-Search or CSLA model with branches that run one by one."""
    model = copy.deepcopy(model)
    for name, conv in list(model.named_modules()):
        if isinstance(conv, CSLAConv2d):
            model.set_submodule(name, SeparateBranches(conv))
    return model


def plain_inference_models(architecture: Architecture, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Makes the RepVGG with merged branches, and the target with folded BatchNorm, which have the same layers."""
    merged = reparameterize_model(repvgg(architecture, device).eval())
    folded = reparameterize_model(target(architecture, device, scales=False).eval())
    return merged.to(memory_format=memory_format(device)), folded.to(memory_format=memory_format(device))


def memory_format(device: torch.device) -> torch.memory_format:
    """Returns the layout that is fastest on a device, and safe.

    On CPUs torch 2.14 corrupts memory in the backward pass of RepVGG's 1x1 stem at 224 px in channels_last.
    """
    return torch.channels_last if device.type == 'cuda' else torch.contiguous_format


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Returns the context manager for forward passes in this precision."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def batch(size: int, img_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Makes random images and labels."""
    images = torch.randn(size, 3, img_size, img_size, device=device)
    return images.contiguous(memory_format=memory_format(device)), torch.randint(0, 1000, (size,), device=device)


def make_optimizer(model: nn.Module) -> Optimizer:
    """Makes RepOptSGD for a model that carries scales, else SGD; both with Nesterov momentum and fused."""
    settings: dict[str, Any] = {'lr': 1e-3, 'momentum': 0.9, 'nesterov': True, 'weight_decay': 4e-5, 'fused': True}
    if carried_scales(model):
        return RepOptSGD(model.parameters(), grad_mults=make_grad_mults(model), **settings)
    return SGD(model.parameters(), **settings)


def forward_pass(model: nn.Module, images: Tensor, labels: Tensor, precision: str = 'float32') -> Callable[[], Tensor]:
    """Makes the forward pass of a training step, which returns the loss."""

    def forward() -> Tensor:
        with autocast(precision, images.device):
            return F.cross_entropy(model(images), labels)

    return forward


def training_step(model: nn.Module, images: Tensor, labels: Tensor, precision: str = 'float32') -> Callable[[], None]:
    """Makes a model's optimizer, runs two steps, after which all memory is allocated, and returns the step.

    A step leaves no gradients behind.
    """
    optimizer = make_optimizer(model)
    forward = forward_pass(model.train(), images, labels, precision)

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    return step


def time_in_turns(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    rounds: int,
    warmup: int = 0,
    prepare: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Times calls against each other, see `take_turns`.

    Args:
        calls: Name to what is timed until the device has finished it.
        device: Where it runs.
        rounds: Number of rounds.
        warmup: Number of rounds to discard at the start.
        prepare: Called before each call, and not timed.

    Returns:
        Name to the seconds of each round.
    """

    def turn(call: Callable[[], Any]) -> float:
        prepare()
        return time_call(synchronized(call, device))

    return take_turns({name: partial(turn, call) for name, call in calls.items()}, rounds, warmup)


def synchronized(call: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """Makes a call wait until the device has finished."""

    def run() -> None:
        call()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)

    return run


def inference(model: nn.Module, images: Tensor, precision: str = 'float32') -> Callable[[], None]:
    """Makes a forward pass without gradients."""
    model.eval()

    @torch.inference_mode()
    def run() -> None:
        with autocast(precision, images.device):
            model(images)

    return run
