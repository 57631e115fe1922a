"""The modules of a network by name, whatever compilation and parallel training have wrapped around them."""

from typing import Any

from torch import nn

__all__ = ['modules_of', 'uncompiled_name', 'unwrap']


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the network inside of wrappers for compilation and parallel training."""
    inner: Any = model
    while hasattr(inner, '_orig_mod') or isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
        inner = inner._orig_mod if hasattr(inner, '_orig_mod') else inner.module
    return inner


def uncompiled_name(name: str) -> str:
    """Returns the name that a module or tensor has if no part of the network is compiled."""
    return '.'.join(part for part in name.split('.') if part != '_orig_mod')


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Returns name to module, in the network's order; compiled parts by the names that they have uncompiled."""
    return {uncompiled_name(name): each for name, each in model.named_modules() if not hasattr(each, '_orig_mod')}
