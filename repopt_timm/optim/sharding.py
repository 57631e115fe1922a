"""Parameters that FSDP2 (`fully_shard`) has spread over processes, seen from one of them."""

from typing import Any

from torch import Tensor

__all__ = ['local', 'local_rows']


def _is_sharded(tensor: Tensor) -> bool:
    # Looking for the method spares an import that takes long and that not every build of torch has.
    return hasattr(tensor, 'to_local')


def local(tensor: Any) -> Any:
    """Returns the part of a DTensor that this process holds, without copying; any other value as it is."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """Tells which rows, `start` to `stop` of the first dimension, of a tensor this process holds.

    Raises:
        ValueError: If a DTensor is sharded along another dimension.
    """
    if not _is_sharded(tensor):
        return 0, len(tensor)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = tensor
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, sharded.device_mesh, sharded.placements)
    if tuple(shape[1:]) != tuple(tensor.shape[1:]) or any(placement.is_partial() for placement in sharded.placements):
        raise ValueError(
            f'A kernel of shape {tuple(tensor.shape)} is placed as {sharded.placements}, but RepOptimizers need whole '
            f'rows. Shard it along dimension 0, as fully_shard does.'
        )
    return offset[0], offset[0] + shape[0]
