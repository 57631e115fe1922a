"""The Rule of Initialization, and the scales that a plain convolution carries (section 3.3 of arXiv 2205.15242)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .branches import Branch, make_branches, merge
from .convolutions import Geometry, conv_prior, kernel_of, refusal
from .csla import CSLAConv2d
from .modules import modules_of, unwrap
from .shards import is_sharded
from .vectors import check_vectors, fingerprint

__all__ = [
    'CarriedScales',
    'ScalesMapping',
    'attach_scales',
    'branch_counts',
    'carried_scales',
    'drop_scales',
    'geometry_of',
    'initialize',
    'network_name',
    'prepare',
    'scaled_convs',
]

ScalesMapping = Mapping[str, Mapping[str, Tensor]]
"""Module name to branch name to vector of shape (O,): `repopt_timm.Scales`, or any mapping of this form."""

_ATTRIBUTE = 'repopt_scales'


@dataclass(frozen=True)
class CarriedScales:
    """The scales of one convolution, kept on the module as a plain attribute.

    A module's attribute survives copies, pickling, renaming, wrapping and casts, where a parameter's attribute, its
    position or a buffer's dtype would not.

    Attributes:
        vectors: Branch name to float32 vector of shape (O,).
        counts: Branch name to count.
        fingerprint: Identifies the scales of the whole network that these belong to.
        module: Name of the convolution in the network that the scales were put on.
        siblings: Names of all convolutions of that network that got scales.
        initialized: Whether the convolution's weight came from the Rule of Initialization.
    """

    vectors: dict[str, Tensor]
    counts: dict[str, int]
    fingerprint: str
    module: str
    siblings: tuple[str, ...]
    initialized: bool = False


class ScaledConv(NamedTuple):
    """A convolution, its name in the network, and the branches that its scales are for."""

    name: str
    conv: nn.Conv2d
    branches: tuple[Branch, ...]


def network_name(model: nn.Module) -> str:
    """Returns the name of a network: that of its architecture in timm, else its class's."""
    inner: Any = unwrap(model)
    name = getattr(inner, 'architecture', None)
    if not isinstance(name, str):
        config = getattr(inner, 'pretrained_cfg', None)
        name = config.get('architecture') if isinstance(config, Mapping) else None
    return name or type(inner).__name__


def geometry_of(model: nn.Module, names: Mapping[str, object]) -> dict[str, Geometry]:
    """Reads the geometry of the named convolutions, plain or CSLA, in the order of the model's modules."""
    convs = [(name, each) for name, each in modules_of(model).items() if isinstance(each, nn.Conv2d | CSLAConv2d)]
    return {name: Geometry.of(conv, first=index == 0) for index, (name, conv) in enumerate(convs) if name in names}


def branch_counts(scales: ScalesMapping, module: str, conv: nn.Module | None = None) -> dict[str, int]:
    """Returns branch name to count of one convolution: what the scales state, else its own prior, else 1."""
    counts = getattr(scales, 'counts', {}).get(module)
    if counts is None:
        prior = None if conv is None else conv_prior(conv)
        counts = {} if prior is None else prior.branches
    return {branch: counts.get(branch, 1) for branch in scales[module]}


def scaled_convs(model: nn.Module, scales: ScalesMapping) -> list[ScaledConv]:
    """Finds the convolutions that `scales` names, and checks that the scales fit them.

    Raises:
        ValueError: If a named module is missing or is not a plain convolution, it is not the convolution that the
            scales were searched on, or a vector does not fit it.
    """
    if not isinstance(scales, Mapping):
        raise ValueError(
            f'The scales are a {type(scales).__name__}, expected Scales or a mapping of module names to branch names '
            f'to vectors. Scales go by module name, never by position.'
        )
    modules = modules_of(model)
    return [scaled_conv(model, name, modules.get(name), scales) for name in scales]


def scaled_conv(model: nn.Module, name: str, conv: nn.Module | None, scales: ScalesMapping) -> ScaledConv:
    """Checks that the scales of module `name` fit the convolution `conv` of a model; see `scaled_convs`."""
    source = getattr(scales, 'source', '') or 'The scales'
    owner = type(model).__name__
    if not isinstance(conv, nn.Conv2d):
        kind = 'has no such module' if conv is None else f'has a {type(conv).__name__} there'
        raise ValueError(
            f"{source}: there are scales for a convolution '{name}', but {owner} {kind}. Scales go by module name: use "
            f'those of this network.'
        )
    if reason := refusal(conv):
        raise ValueError(f"{source}: there are scales for '{name}' of {owner}, but {reason}. Search anew without it.")
    geometry = getattr(scales, 'geometry', {})
    if name in geometry:
        check_geometry(name, geometry[name], conv, source)
    try:
        branches = make_branches(branch_counts(scales, name, conv), conv)
    except ValueError as error:
        raise ValueError(f"{source}: module '{name}': {error}") from None
    check_vectors(name, scales[name], conv.out_channels, source=getattr(scales, 'source', ''))
    return ScaledConv(name, conv, branches)


def check_geometry(name: str, searched: Geometry, conv: nn.Module, source: str = '') -> None:
    """Checks that a convolution is the one that scales were searched on.

    Raises:
        ValueError: If it is not; names the convolution and both geometries.
    """
    found = Geometry.of(conv, first=searched.in_channels is None)
    if found != searched:
        raise ValueError(
            f"{source or 'Scales'}: searched with '{name}' of {searched}, but the model has {found} there. Search "
            f'and target need the same convolutions: make the model alike (strides, widths), or search anew.'
        )


def check_network(model: nn.Module, scales: ScalesMapping) -> None:
    """Checks that scales which know their network belong to this one.

    Raises:
        ValueError: If they do not; names both.
    """
    searched, found = getattr(scales, 'architecture', ''), network_name(model)
    if searched and searched != found:
        source = getattr(scales, 'source', '') or 'The scales'
        raise ValueError(
            f'{source}: these are scales of {searched}, but the model is a {found}. Scales belong to one network: '
            f"search some for {found}, or, if both are the same under two names, use scales.renamed('{found}')."
        )


def attach_scales(model: nn.Module, scales: ScalesMapping, initialized: bool = False) -> None:
    """Puts scales on a model's convolutions, where the optimizers find them; weights stay as they are.

    Args:
        model: Any model whose convolutions `scales` names.
        scales: Module name to branch name to vector of shape (O,).
        initialized: Remember that the weights come from the Rule of Initialization.

    Raises:
        ValueError: If the scales do not fit the model.
    """
    check_network(model, scales)
    found = scaled_convs(model, scales)
    counts = {name: branch_counts(scales, name, conv) for name, conv, _ in found}
    identity = fingerprint(scales, network_name(model), geometry_of(model, scales), counts)
    for name, conv, _ in found:
        vectors = {branch: vector.detach().to('cpu', torch.float32).clone() for branch, vector in scales[name].items()}
        carried = CarriedScales(vectors, counts[name], identity, name, tuple(scales), initialized)
        setattr(conv, _ATTRIBUTE, carried)


def drop_scales(conv: nn.Module) -> None:
    """Takes the scales off a convolution, whose weight is another one from now on."""
    if hasattr(conv, _ATTRIBUTE):
        delattr(conv, _ATTRIBUTE)


def carried_scales(model: nn.Module) -> dict[str, CarriedScales]:
    """Collects the scales that the convolutions of a model carry, by module name."""
    return {name: getattr(each, _ATTRIBUTE) for name, each in modules_of(model).items() if hasattr(each, _ATTRIBUTE)}


@torch.no_grad()
def initialize(model: nn.Module, scales: ScalesMapping) -> None:
    """Applies the Rule of Initialization: `W' = sum_b s_b * A_b theta_b` with freshly drawn operators.

    Operators get PyTorch's default initialization, as in a Hyper-Search; the identity starts at its searched value.
    Random numbers come from torch's global generator, in the order of the scales' modules.

    Args:
        model: Any model whose convolutions `scales` names; their weights are overwritten in place.
        scales: Module name to branch name to vector of shape (O,).

    Raises:
        ValueError: If the scales do not fit the model, it is a Hyper-Search or CSLA model, or it is sharded.
    """
    check_network(model, scales)
    found = scaled_convs(model, scales)
    for name, conv, _ in found:
        if is_sharded(kernel_of(conv)):
            raise ValueError(
                f"'{name}' of {type(model).__name__} is sharded already, so its kernel cannot be drawn. Prepare the "
                f'model before sharding it with fully_shard.'
            )
    for name, conv, branches in found:
        # Under a fake quantization `weight` is computed anew at each access.
        kernel = kernel_of(conv)
        operators = {}
        for branch in branches:
            operator = branch.draw_(kernel.new_empty(branch.operator_shape(kernel.shape)))
            if not branch.scaled:
                operator.copy_(scales[name][branch.name].view(-1, 1, 1, 1))
            operators[branch.name] = operator
        kernel.copy_(merge(branches, operators, scales[name], kernel.shape))


def prepare(model: nn.Module, scales: ScalesMapping, init: bool = True) -> nn.Module:
    """Makes a plain model ready for a RepOptimizer: applies the Rule of Initialization and attaches the scales.

    Args:
        model: Any model whose convolutions `scales` names; changed in place.
        scales: Module name to branch name to vector of shape (O,).
        init: Apply the Rule of Initialization; False keeps the weights, for fine-tuning.

    Returns:
        The model.

    Raises:
        ValueError: If the scales do not fit the model.

    Example:
        >>> model = prepare(timm.create_model('resnet18'), Scales.initial(timm.create_model('resnet18')))
    """
    if init:
        initialize(model, scales)
    attach_scales(model, scales, initialized=init)
    return model


def kind_of(model: nn.Module) -> str:
    """Returns `hs` for a Hyper-Search model, `csla` for one with constant scales, `target` for a plain one."""
    convs = [module for module in model.modules() if isinstance(module, CSLAConv2d)]
    if not convs:
        return 'target'
    return 'hs' if any(conv.trainable_scales for conv in convs) else 'csla'
