"""The structural prior of a plain network: which convolution has which branches, and what their scales start from.

`l` and `n` count convolutions; deeper ones start with smaller scales, so that a sum of branches does not grow with
depth (section 4.1 of arXiv 2205.15242).
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .branches import BranchCounts, counted, make_branches
from .convolutions import ConvPrior, RefusedConv, check_no_branches, conv_prior, pair, refusal
from .modules import modules_of

__all__ = [
    'Prior',
    'initial_scales',
    'refused_convs',
    'repvgg_branches',
    'repvgg_prior',
    'resolve_prior',
    'run_scale',
    'stage_scale',
]

Prior = Mapping[str, BranchCounts | ConvPrior] | Callable[[nn.Module], Mapping[str, BranchCounts | ConvPrior]]
"""Module name to branches, or a function that returns such a mapping for a model."""

_logger = logging.getLogger(__name__)


def stage_scale(index: int) -> float:
    """Initial scale in a RepOpt-VGG: `sqrt(2 / l)` for the block of index l in its stage, 1 for l = 0 (section 4.1)."""
    return math.sqrt(2.0 / index) if index > 0 else 1.0


def run_scale(position: int) -> float:
    """Initial scale elsewhere: `sqrt(2 / (n + 1))` for the n-th convolution, from 1, of a run of equal channels."""
    # Published for RepGhostNet: github.com/DingXiaoH/RepOptimizers, repoptimizer/repoptghostnet_model.py.
    return math.sqrt(2.0 / (position + 1))


def repvgg_branches(conv: nn.Conv2d) -> dict[str, int]:
    """Returns the branches of a RepVGG block: kxk, 1x1 in a larger kernel, identity where channels and stride allow."""
    names = ['kxk']
    if tuple(conv.kernel_size) != (1, 1):
        names.append('1x1')
    if conv.in_channels == conv.out_channels and pair(conv.stride) == (1, 1):
        names.append('identity')
    return counted(names)


def repvgg_prior(model: nn.Module) -> dict[str, ConvPrior]:
    """Gives each convolution that can be converted the branches of a RepVGG block.

    A model whose convolutions carry a prior, as those of RepOpt-VGG do, states its own, which is returned. In others,
    scales start at `sqrt(2 / (n + 1))`, where n = 1, 2, … counts the convolutions of a run of equal channels and stride
    1, and starts again where one of them changes. What cannot be converted is logged; `refused_convs` lists it.

    Args:
        model: Any network.

    Returns:
        Module name to prior, in the order of the model's modules.

    Raises:
        ValueError: If the model has multi-branch blocks of its own, or no convolution that can be converted.
    """
    refused = refused_convs(model)
    refused_names = {each.name for each in refused}
    convs = {name: conv for name, conv in _convs(model) if name not in refused_names}
    if refused:
        listed = '; '.join(f"'{name}' ({kind}): {reason}" for name, kind, reason in refused)
        _logger.info(f'{type(model).__name__}: {len(refused)} convolutions stay as they are: {listed}')
    if not convs:
        raise ValueError(
            f'{type(model).__name__} has no convolution that can be converted'
            + (f": '{refused[0].name}' is refused, as {refused[0].reason}." if refused else '.')
        )
    carried = {name: prior for name, conv in convs.items() if (prior := conv_prior(conv)) is not None}
    return resolve_prior(model, carried or {name: repvgg_branches(conv) for name, conv in convs.items()})


def refused_convs(model: nn.Module) -> list[RefusedConv]:
    """Lists the convolutions of a model, of any dimension, that cannot have branches: name, type and reason.

    Raises:
        ValueError: If the model has multi-branch blocks of its own.
    """
    check_no_branches(model)
    convs = [(name, each) for name, each in modules_of(model).items() if isinstance(each, _ConvNd)]
    reasons = [(name, type(conv).__name__, refusal(conv)) for name, conv in convs]
    return [RefusedConv(name, kind, reason) for name, kind, reason in reasons if reason is not None]


def resolve_prior(model: nn.Module, prior: Prior | None = None) -> dict[str, ConvPrior]:
    """Makes a checked mapping of any form of prior.

    Args:
        model: Network whose modules it names.
        prior: Module name to branch names, to {branch name: count} or to `ConvPrior`; a function that returns such a
            mapping for the model. Defaults to `repvgg_prior`.

    Returns:
        Module name to prior, in the order of the model's modules.

    Raises:
        ValueError: If a name is not that of a convolution that can be converted, a convolution cannot have one of its
            branches, or the model has multi-branch blocks of its own.
    """
    if prior is None:
        return repvgg_prior(model)
    check_no_branches(model)
    mapping = prior(model) if callable(prior) else prior
    if not isinstance(mapping, Mapping) or not mapping:
        raise ValueError(f'The prior is {mapping!r:.80}, expected a mapping of module names to branches.')
    for name in mapping:
        _check_convertible(model, name)
    convs = [(name, conv) for name, conv in _convs(model) if name in mapping]
    if len(convs) < len(mapping):
        twice = sorted(set(mapping) - {name for name, _ in convs})
        raise ValueError(f'The prior names a shared convolution twice: {", ".join(twice)}. Use its first name alone.')
    resolved = {}
    position, channels = 0, 0
    for name, conv in convs:
        same = conv.in_channels == conv.out_channels == channels and pair(conv.stride) == (1, 1)
        position, channels = (position + 1 if same else 1), conv.out_channels
        given: Any = mapping[name]
        own = isinstance(given, ConvPrior)
        branches = _counted(given.branches if own else given, name)
        made = replace(given, branches=branches) if own else ConvPrior(branches, run_scale(position))
        try:
            make_branches(made.branches, conv)
        except ValueError as error:
            raise ValueError(f"'{name}': {error}") from None
        resolved[name] = made
    return resolved


def initial_scales(model: nn.Module, prior: Mapping[str, ConvPrior]) -> dict[str, dict[str, Tensor]]:
    """Returns the values that a Hyper-Search starts from; 1 for an identity.

    Returns:
        Module name to branch name to vector of shape (O,), float32.
    """
    scales: dict[str, dict[str, Tensor]] = {}
    convs = dict(_convs(model))
    for name, each in prior.items():
        channels = (convs[name].out_channels,)
        values = {branch: 1.0 if branch == 'identity' else each.initial for branch in each.branches}
        scales[name] = {branch: torch.full(channels, value, device='cpu') for branch, value in values.items()}
    return scales


def _counted(branches: BranchCounts, name: str) -> dict[str, int]:
    try:
        return counted(branches)
    except TypeError:
        raise ValueError(f"'{name}': its branches are {branches!r:.80}, expected names or {{name: count}}.") from None
    except ValueError as error:
        raise ValueError(f"'{name}': {error}") from None


def _convs(model: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    return [(name, module) for name, module in modules_of(model).items() if isinstance(module, nn.Conv2d)]


def _check_convertible(model: nn.Module, name: str) -> None:
    modules = modules_of(model, remove_duplicate=False)
    if name not in modules:
        raise ValueError(f"The prior names '{name}', but {type(model).__name__} has no such module.")
    if reason := refusal(modules[name]):
        raise ValueError(f"'{name}' of {type(model).__name__} cannot have branches: {reason}.")
