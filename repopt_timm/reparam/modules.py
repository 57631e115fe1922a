"""The modules of a network by name, whatever compilation, parallel training and averaging have wrapped around them."""

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

__all__ = ['modules_of', 'name_as_part', 'uncompiled_name', 'unwrap']


_NAMES_ATTRIBUTE = 'repopt_names'
_PARALLEL_OR_AVERAGED = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
_AVERAGED_OF_TIMM = ('ModelEmaV2', 'ModelEmaV3')


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the network inside of wrappers for compilation, parallel training and averages of weights."""
    inner: Any = model
    while True:
        if hasattr(inner, '_orig_mod'):
            inner = inner._orig_mod
        elif isinstance(inner, _PARALLEL_OR_AVERAGED) or type(inner).__name__ in _AVERAGED_OF_TIMM:
            inner = inner.module
        else:
            return inner


def uncompiled_name(name: str) -> str:
    """Returns the name that a module or tensor has if no part of the network is compiled."""
    return '.'.join(part for part in name.split('.') if part != '_orig_mod')


def name_as_part(model: nn.Module, names: dict[str, str]) -> None:
    """Lets a network that was made of another's modules go by the names of the other.

    Args:
        model: The network, changed in place.
        names: Child of `model` to its name in the other network, where that differs.
    """
    setattr(model, _NAMES_ATTRIBUTE, names)


def modules_of(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """Returns name to module, in the network's order; compiled parts by the names that they have uncompiled.

    Args:
        model: The network.
        remove_duplicate: List a shared module once.
    """
    names = getattr(model, _NAMES_ATTRIBUTE, {})
    modules = {}
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if not hasattr(module, '_orig_mod'):
            child, _, rest = uncompiled_name(name).partition('.')
            modules['.'.join(filter(None, (names.get(child, child), rest)))] = module
    return modules
