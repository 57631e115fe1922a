"""Twins of a plain network: its convolutions become CSLA convolutions, and back (section 3.2, arXiv 2205.15242).

plain  --hyper_search-->  trainable scales   trained with an ordinary optimizer; its scales are the result
plain  --csla-->          constant scales    training it is training the plain network with a RepOptimizer
twin   --to_plain-->      plain              same function, one convolution each
"""

import copy
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .branches import make_branches
from .convolution import add_branches, branches_of, kind_of, merge_branches
from .modules import modules_of, unwrap
from .prior import Prior, log_convs_without, resolve_prior
from .scales import CarriedScales, Scales, ScalesMapping, drop_scales, scales_for


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
        scales: The scales. Defaults to what the model's convolutions carry. A prior gives a twin without scales, which
            raises until a state dict brings them.

    Returns:
        The twin.

    Raises:
        ValueError: If there are no scales, they do not fit, or the model is a twin already.
    """
    model = unwrap(model)
    return convert_(copy.deepcopy(model), Scales.from_model(model) if scales is None else scales, False)


def to_plain(twin: nn.Module) -> nn.Module:
    """Returns the plain network of a twin: merged kernels, the same function, the original structure.

    Args:
        twin: A Hyper-Search or CSLA model. It is copied; dtype, device, mode and attributes stay as they are.

    Returns:
        The plain network, which carries the twin's scales: both can be trained side by side from the same start.

    Raises:
        ValueError: If the model has no CSLA convolutions, or these have no scales yet.
    """
    twin = unwrap(twin)
    if kind_of(twin) == 'target':
        raise ValueError(f'{type(twin).__name__} is plain already: it has no CSLA convolution.')
    scales = Scales.from_model(twin)
    plain: Any = copy.deepcopy(twin)
    for name, conv in modules_of(plain).items():
        if branches_of(conv):
            merge_branches(conv)  # type: ignore[arg-type]
            CarriedScales(scales, name, initialized=True).put_on(conv)
    for module in plain.modules():
        # A network that states what it is in records of its own, whole or as a part.
        if hasattr(module, 'note_plain'):
            module.note_plain()
    return plain


def convert_(model: nn.Module, scales_or_prior: ScalesMapping | Prior | None, trainable_scales: bool) -> nn.Module:
    """Makes the convolutions of a plain network CSLA convolutions, in place; see `hyper_search` and `csla`."""
    if kind_of(model) != 'target':
        raise ValueError(f'{type(model).__name__} has CSLA convolutions already. Make its twin from to_plain(model).')
    given: Any = scales_or_prior
    if isinstance(given, str | os.PathLike):
        raise ValueError(f"Expected scales or a prior, found '{given!s:.80}': use load_scales(source, model).")
    scales = None
    branches = given.values() if isinstance(given, Mapping) else ()
    if any(isinstance(value, Tensor) for each in branches if isinstance(each, Mapping) for value in each.values()):
        scales = scales_for(model, given)
    elif trainable_scales:
        scales = Scales.initial(model, given)
    prior = resolve_prior(model, given if scales is None else scales.counts)
    modules: dict[str, Any] = modules_of(model)
    owners: dict[Tensor, str] = {}
    for name, module in modules.items():
        for kernel in module.parameters(recurse=False):
            other = owners.setdefault(kernel, name)
            if other != name and {name, other} & set(prior):
                raise ValueError(
                    f"'{name}' and '{other}' share one kernel, which branches would separate. Use one module in both "
                    f'places.'
                )
    log_convs_without(model, prior, 'stay without branches')
    for name, each in prior.items():
        vectors, start = (None, 'paper') if scales is None else (scales[name], scales.start)
        add_branches(modules[name], make_branches(each.branches, modules[name]), vectors, trainable_scales, start)
    for module in modules.values():
        # Convolutions that stay plain train without Grad Mults, too.
        drop_scales(module)
    # What a search finds comes from that search.
    model.scales_provenance = {} if scales is None or trainable_scales else scales.provenance  # type: ignore[assignment]
    return model
