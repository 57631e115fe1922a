"""Chunks of kernels: what a step updates at a time, in memory of bounded size."""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reparam import GradMult
from .sharding import local, local_rows

__all__ = [
    'CHUNK_SIZES',
    'Chunk',
    'Rows',
    'add_multiples',
    'chunks_of',
    'is_packed',
    'multiply',
    'rows_of',
]

CHUNK_SIZES = {'cpu': 9 * 2**17, 'cuda': 2**25}
"""Device type to elements of all that a step works in, on top of what it keeps.

On a CPU few enough that products are still in the cache when the update reads them and enough that calls do not count,
on a GPU enough for few launches. Kernels of 3x3 taps fill multiples of 9.
"""


@dataclass(frozen=True)
class Rows:
    """Some output channels of one kernel, and their Grad Mult.

    Attributes:
        param: The kernel.
        start: First row, counted from the first that this process holds.
        stop: Row after the last.
        size: Number of elements.
        is_last: Whether they are the last of the kernel.
        mult: Grad Mult of the rows.
    """

    param: Tensor
    start: int
    stop: int
    size: int
    is_last: bool
    mult: GradMult

    def of(self, tensor: Tensor) -> Tensor:
        """Returns these rows of a tensor of the kernel's shape, as a view."""
        rows = local(tensor)
        return rows if self.is_last and self.start == 0 else rows[self.start : self.stop]


def rows_of(param: Tensor, mult: GradMult, places: int = 1) -> list[Rows]:
    """Cuts a kernel, or what this process holds of it, into rows of about the size of a chunk, for so many places."""
    start, stop = local_rows(param)
    mult, total, row = mult.rows(start, stop), stop - start, math.prod(param.shape[1:])
    count = max(1, chunk_size(param, places) // row)
    if mult.channels < count < total:
        # Of whole groups the diagonals are one view.
        count -= count % mult.channels
    spans = [(first, min(first + count, total)) for first in range(0, total, count)]
    return [
        Rows(param, first, last, (last - first) * row, last == total, mult.rows(first, last)) for first, last in spans
    ]


def chunk_size(param: Tensor, places: int) -> int:
    """Returns how many elements a chunk may have if so many places are needed: any number without a place."""
    return CHUNK_SIZES.get(param.device.type, CHUNK_SIZES['cpu']) // places if places else sys.maxsize


@dataclass(frozen=True)
class Chunk:
    """Rows of kernels that are stepped together, and memory for what is computed on the way.

    Attributes:
        rows: The rows.
        places: Lists of a tensor for each of the rows; none where memory is the compiler's business.
    """

    rows: list[Rows]
    places: list[list[Tensor]]

    @property
    def mults(self) -> list[GradMult]:
        """Grad Mult of each of the rows."""
        return [rows.mult for rows in self.rows]

    def each(self, get: Callable[[Tensor], Tensor | None]) -> list[Any]:
        """Returns what a function returns for a kernel, each of the rows of it."""
        found = [get(rows.param) for rows in self.rows]
        return [value if value is None else rows.of(value) for rows, value in zip(self.rows, found)]


def chunks_of(rows: Iterable[Rows], places: int) -> list[Chunk]:
    """Puts rows together into chunks of one device and dtype, with so many places for tensors of their size."""
    lists: dict[Any, list[list[Rows]]] = {}
    for each in rows:
        chunks = lists.setdefault((each.param.device, each.param.dtype), [[]])
        if chunks[-1] and _total_size(chunks[-1]) + each.size > chunk_size(each.param, places):
            chunks.append([])
        chunks[-1].append(each)
    made = []
    for (device, dtype), chunks in lists.items():
        # Once for all chunks: new memory would be cold.
        size = max(map(_total_size, chunks))
        memory = [torch.empty(size, device=device, dtype=dtype) for _ in range(places)]
        made += [Chunk(chunk, [_carve(place, chunk) for place in memory]) for chunk in chunks]
    return made


def _total_size(rows: Sequence[Rows]) -> int:
    return sum(each.size for each in rows)


def _carve(memory: Tensor, rows: Sequence[Rows]) -> list[Tensor]:
    """Takes places for rows of kernels out of memory, each laid out like the kernel."""
    places = []
    used = 0
    for each in rows:
        like = each.of(each.param)
        places.append(memory.as_strided(like.shape, like.stride(), used) if is_packed(like) else torch.empty_like(like))
        used += each.size
    return places


def multiply(mults: list[GradMult], grads: list[Tensor], out: list[Tensor] | None) -> list[Tensor]:
    """Multiplies tensors with Grad Mults, in lists where those are masks of the kernels' size."""
    if masks := _masks(mults, grads):
        return list(torch._foreach_mul(grads, masks))
    places = [None] * len(grads) if out is None else out
    return [mult.multiply(grad, place) for mult, grad, place in zip(mults, grads, places)]


def add_multiples(mults: list[GradMult], kernels: list[Tensor], updates: list[Tensor]) -> None:
    """Adds updates times Grad Mults to kernels in place, in lists where those are masks of the kernels' size."""
    if masks := _masks(mults, updates):
        torch._foreach_addcmul_(kernels, updates, masks)
        return
    for mult, kernel, update in zip(mults, kernels, updates):
        mult.add_multiple(kernel, update)


def _masks(mults: list[GradMult], tensors: list[Tensor]) -> list[Tensor]:
    masks = [mult.taps for mult in mults]
    listed = tensors[0].is_cuda and all(
        (mask.shape, mask.dtype) == (tensor.shape, tensor.dtype) for mask, tensor in zip(masks, tensors)
    )
    return masks if listed else []


def is_packed(tensor: Tensor) -> bool:
    """Tells whether a tensor has no gaps and its rows lie in memory one after the other."""
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
