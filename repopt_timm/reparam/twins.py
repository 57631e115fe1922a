"""Twins of a plain network: its convolutions replaced by CSLA convolutions, and back (section 3.2, arXiv 2205.15242).

plain  --hyper_search-->  trainable scales   trained with an ordinary optimizer; its scales are the result
plain  --csla-->          constant scales    what training the plain network with a RepOptimizer is equivalent to
twin   --to_plain-->      plain              same function, one convolution each
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .convolutions import ConvPrior, check_no_branches
from .csla import CSLAConv2d
from .initialization import (
    ScalesMapping,
    attach_scales,
    branch_counts,
    carried_scales,
    check_network,
    kind_of,
    scaled_convs,
)
from .modules import modules_of, unwrap
from .prior import Prior, resolve_prior

__all__ = ['convert_', 'csla', 'hyper_search', 'replace_modules', 'take_over_hooks', 'to_plain', 'twin_vectors']

_HOOKS = (
    '_backward_hooks',
    '_backward_pre_hooks',
    '_forward_hooks',
    '_forward_hooks_always_called',
    '_forward_hooks_with_kwargs',
    '_forward_pre_hooks',
    '_forward_pre_hooks_with_kwargs',
    '_state_dict_hooks',
    '_state_dict_pre_hooks',
)

# What belongs to one of the two classes alone, and the scales that the plain convolution carried.
_OWN_ATTRIBUTES = frozenset(
    {
        'has_scales',
        'initial_scale',
        'output_padding',
        'padding_mode',
        'repopt_scales',
        'trainable_scales',
        'transposed',
    }
)


def hyper_search(model: nn.Module, scales_or_prior: ScalesMapping | Prior | None = None) -> nn.Module:
    """Makes the Hyper-Search twin of a plain network: convolutions become branches with trainable scales.

    Args:
        model: Any network without multi-branch blocks of its own. It is copied: buffers, hooks, dtype, device, mode and
            attributes stay as they are. Operators of branches are drawn anew.
        scales_or_prior: The prior, see `resolve_prior`; or scales, whose branches and values it starts from. Defaults
            to `repvgg_prior`.

    Returns:
        The twin.

    Raises:
        ValueError: If a named convolution cannot be converted, scales do not fit, or the model is a twin already.

    Example:
        >>> search = hyper_search(timm.create_model('resnet18'))
    """
    return convert_(copy.deepcopy(unwrap(model)), scales_or_prior, trainable_scales=True)


def csla(model: nn.Module, scales: ScalesMapping | Prior | None = None) -> nn.Module:
    """Makes the CSLA twin of a plain network: convolutions become branches with constant scales.

    Args:
        model: See `hyper_search`.
        scales: The scales. Defaults to what the model's convolutions carry. A prior gives a twin without scales,
            which raises until a checkpoint brings them.

    Returns:
        The twin.

    Raises:
        ValueError: If there are no scales, they do not fit, or the model is a twin already.
    """
    model = unwrap(model)
    if scales is None:
        carried = carried_scales(model)
        if not carried:
            raise ValueError(f'{type(model).__name__} carries no scales, so name them: csla(model, scales).')
        vectors = {name: each.vectors for name, each in carried.items()}
        scales = _Counted(vectors, {name: each.counts for name, each in carried.items()})
    return convert_(copy.deepcopy(model), scales, trainable_scales=False)


def to_plain(twin: nn.Module) -> nn.Module:
    """Returns the plain network of a twin: merged kernels, the same function, the structure of before.

    Args:
        twin: A Hyper-Search or CSLA model. It is copied; dtype, device, mode and attributes stay as they are.

    Returns:
        The plain network, which carries the twin's scales: both can be trained side by side from the same start.

    Raises:
        ValueError: If the model has no CSLA convolutions, or these have no scales yet.
    """
    twin = unwrap(twin)
    vectors = twin_vectors(twin)
    if not vectors:
        raise ValueError(f'{type(twin).__name__} is plain already: it has no CSLA convolution.')
    plain = copy.deepcopy(twin)
    converted: dict[nn.Module, nn.Module] = {
        module: _take_over(module, module.to_conv()) for module in plain.modules() if isinstance(module, CSLAConv2d)
    }
    counts = {name: each.branch_counts for name, each in modules_of(twin).items() if isinstance(each, CSLAConv2d)}
    plain = replace_modules(plain, converted)
    attach_scales(plain, _Counted(vectors, counts), initialized=True)
    return plain


def twin_vectors(twin: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Returns the scales of a twin, module name to branch name to vector; empty for a plain network."""
    return {name: each.vectors() for name, each in modules_of(twin).items() if isinstance(each, CSLAConv2d)}


def convert_(model: nn.Module, scales_or_prior: ScalesMapping | Prior | None, trainable_scales: bool) -> nn.Module:
    """Replaces the convolutions of a plain network in place; see `hyper_search` and `csla`."""
    if kind_of(model) != 'target':
        raise ValueError(f'{type(model).__name__} has CSLA convolutions already. Make its twin from to_plain(model).')
    given: Any = scales_or_prior
    scales: ScalesMapping | None = given if _is_scales(given) else None
    if scales is not None:
        check_no_branches(model)
        check_network(model, scales)
        found = scaled_convs(model, scales)
        prior = {name: ConvPrior(branch_counts(scales, name, conv)) for name, conv, _ in found}
    else:
        prior = resolve_prior(model, given)
    modules = modules_of(model)
    _check_not_tied(modules, prior)
    converted: dict[nn.Module, nn.Module] = {}
    for name, each in prior.items():
        conv: Any = modules[name]
        initial = each.initial if trainable_scales or scales is not None else None
        twin = CSLAConv2d(conv, each.branches, initial, trainable_scales)
        if scales is not None:
            twin.set_vectors(scales[name], name)
            twin.initial_scale = None
        converted[conv] = _take_over(conv, twin)
    return replace_modules(model, converted)


def _check_not_tied(modules: Mapping[str, nn.Module], converted: Iterable[str]) -> None:
    owners: dict[Tensor, list[str]] = {}
    for name, module in modules.items():
        for kernel in module._parameters.values():
            if kernel is not None:
                owners.setdefault(kernel, []).append(name)
    for name in converted:
        conv: Any = modules[name]
        others = [owner for owner in owners.get(conv.weight, ()) if owner != name]
        if others:
            raise ValueError(
                f"'{name}' and '{others[0]}' share one kernel, which branches would separate. Use one module in both "
                f'places.'
            )


class _Counted(dict):
    """Plain scales with counts."""

    def __init__(self, scales: ScalesMapping, counts: Mapping[str, Mapping[str, int]]):
        super().__init__(scales)
        self.counts = counts


def _is_scales(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    first = next(iter(value.values()), None)
    return isinstance(first, Mapping) and all(isinstance(vector, Tensor) for vector in first.values())


def _take_over(old: nn.Module, new: nn.Module) -> nn.Module:
    """Gives a module the mode, the hooks and the attributes of the one whose place it takes."""
    new.train(old.training)
    take_over_hooks(old, new)
    for name, buffer in old._buffers.items():
        new.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
    for name, child in old._modules.items():
        if name != 'branches':
            new.add_module(name, child)
    for name, value in vars(old).items():
        if name not in vars(new) and name not in _OWN_ATTRIBUTES and not name.startswith('_'):
            setattr(new, name, value)
    return new


def take_over_hooks(old: nn.Module, new: nn.Module) -> None:
    """Gives a module the hooks of the one whose place it takes."""
    for name in _HOOKS:
        if hasattr(old, name):
            getattr(new, name).update(getattr(old, name))
    new._is_full_backward_hook = old._is_full_backward_hook


def replace_modules(model: nn.Module, converted: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replaces modules wherever they are used; a shared one stays shared."""
    if model in converted:
        return converted[model]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in converted:
                parent._modules[name] = converted[child]
    return model
