"""Tensors that FSDP2 (`fully_shard`) has spread over processes."""

from typing import Any

from torch import Tensor

__all__ = ['is_sharded', 'whole']


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether a tensor is a DTensor."""
    # Looking for the method spares an import that takes long and that not every build of torch has.
    return hasattr(tensor, 'to_local')


def whole(tensor: Any) -> Any:
    """Gathers a DTensor, for which all processes have to call this; any other tensor is returned as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
