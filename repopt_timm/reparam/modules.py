"""The modules of a network by name, whatever compilation, parallel training and averaging have wrapped around them."""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

# Children under which `torch.compile` and torch's activation checkpointing keep the module that they wrap.
_TRANSPARENT = ('_orig_mod', '_checkpoint_wrapped_module')


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the network inside of wrappers for compilation, parallel training and averages of weights.

    A wrapper is a module whose only child is called `module`, or what `torch.compile` or torch's activation
    checkpointing returns.
    """
    inner: Any = model
    while True:
        if wrapped := [child for child in _TRANSPARENT if child in inner._modules]:
            inner = inner._modules[wrapped[0]]
        elif [name for name, _ in inner.named_children()] == ['module'] and not isinstance(inner, nn.ModuleDict):
            inner = inner.module
        else:
            return inner


def network_name(model: nn.Module) -> str:
    """Returns the name of a network: the name of its architecture in timm, else its class's."""
    inner: Any = unwrap(model)
    name = getattr(inner, 'architecture', None)
    if not isinstance(name, str):
        config = getattr(inner, 'pretrained_cfg', None)
        name = config.get('architecture') if isinstance(config, dict) else None
    # A network that is one convolution may be its own twin.
    if name:
        return name
    kind = type_before_parametrizations(inner)
    # `fully_shard` gives a module a class of its own, whose last base is the network's.
    return (kind.__bases__[-1] if kind.__bases__[0].__name__ == 'FSDPModule' else kind).__name__


def uncompiled_name(name: str) -> str:
    """Returns the name that a module or tensor has if no part of the network is compiled or checkpointed."""
    return '.'.join(part for part in name.split('.') if part not in _TRANSPARENT)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Returns name to module, in the network's order: names without those of wrappers, a shared module once.

    A network that is made of another's modules maps its children to the other's names in `repopt_names`.
    """
    names = getattr(model, 'repopt_names', {})
    modules = {}
    for name, module in model.named_modules():
        if module._modules.keys().isdisjoint(_TRANSPARENT):
            child, _, rest = uncompiled_name(name).partition('.')
            modules['.'.join(filter(None, (names.get(child, child), rest)))] = module
    return modules


def pair(value: Any) -> tuple[int, int]:
    """Returns height and width of a convolution's setting; a single number stands for both."""
    numbers = [value] if isinstance(value, int) else value
    return numbers[0], numbers[-1]


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether a tensor is a DTensor, as `fully_shard` (FSDP2) makes of parameters."""
    # Looking for the method spares an import that takes long and that not every build of torch has.
    return hasattr(tensor, 'to_local')


def whole(tensor: Any) -> Any:
    """Gathers a DTensor, for which all processes have to call this; any other tensor is returned as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
