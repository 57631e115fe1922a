"""Parameters that FSDP2 (`fully_shard`) has spread over processes, seen from one of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reparam.shards import is_sharded

__all__ = ['local', 'local_rows', 'sum_over_shards']


def local(tensor: Any) -> Any:
    """Returns the part of a DTensor that this process holds, without copying; any other value as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """Tells which rows, `start` to `stop` of the first dimension, of a tensor this process holds.

    Raises:
        ValueError: If a DTensor is sharded along another dimension.
    """
    if not is_sharded(tensor):
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


def sum_over_shards(params: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Adds up what was computed of each parameter's local part, over parameters and processes.

    Args:
        params: The parameters.
        values: A scalar for each.

    Returns:
        The sum, the same on all processes, on the first value's device.
    """
    values_of: dict[Any, list[Tensor]] = {}
    for param, value in zip(params, values):
        sharded: Any = param
        key = (sharded.device_mesh, sharded.placements) if is_sharded(param) else None
        values_of.setdefault((key, value.device), []).append(value)
    totals: dict[Any, Tensor] = {}
    for (key, _), each in values_of.items():
        total = torch.stack(each).sum().to(values[0].device)
        totals[key] = totals[key] + total if key in totals else total
    for key, total in totals.items():
        if key is not None:
            from torch.distributed.tensor import DTensor, Partial, Replicate

            mesh, placements = key
            partial = [Partial() if placement.is_shard() else Replicate() for placement in placements]
            totals[key] = DTensor.from_local(total, mesh, partial).full_tensor()
    return torch.stack(list(totals.values())).sum()
