"""`bench memory`: the memory of a training step, computed without a GPU and without allocating it."""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from ..reporting import markdown_table
from .allocation import saved_bytes, static_bytes
from .bench_models import architecture_of, forward_pass, repvgg, target
from .rows import Row
from .settings import Settings

__all__ = ['CARDS', 'MEMORY_NOTE', 'RESERVE', 'StepMemory', 'bench_memory', 'estimate', 'memory_table']

CARDS = (16, 24, 40, 80)
"""Memory of GPUs, in GiB."""

RESERVE = 0.1
"""Part of a GPU's memory that is reserved for what the estimate does not know."""

MEMORY_NOTE = (
    'In GiB. weights: parameters, gradients and momentum; image: activations that are saved for each image; batch N: '
    'peak of a training step; fits N GiB: the largest batch whose peak leaves '
    f"{RESERVE:.0%} of the memory to what is not counted: workspaces of convolutions, CUDA's context, fragmentation, "
    "DistributedDataParallel's copy of the gradients. float16 takes as much as bfloat16."
)

_GIB = 2**30


@dataclass(frozen=True)
class StepMemory:
    """Memory of a training step with SGD and momentum, in bytes, for any batch size.

    Every tensor's size is a constant, or proportional to the number of images, so that all memory in use after the
    n-th operation is `constant[n] + batch * per_image[n]`.

    Attributes:
        parameters: Size of the parameters, of their gradients, and of their momentum.
        buffers: Size of the buffers.
        constant: See above; without parameters, buffers and momentum.
        per_image: See above.
        saved_constant: What the forward pass saves for the backward pass, independent of the batch.
        saved_per_image: What it saves for each image.
    """

    parameters: int
    buffers: int
    constant: Sequence[int]
    per_image: Sequence[int]
    saved_constant: int
    saved_per_image: int

    @property
    def _static(self) -> int:
        return 2 * self.parameters + self.buffers

    def peak(self, batch: int) -> int:
        """Returns the most memory that a step needs at any time."""
        return self._static + max(fixed + batch * each for fixed, each in zip(self.constant, self.per_image))

    def saved(self, batch: int) -> int:
        """Returns the memory of the saved activations."""
        return self.saved_constant + batch * self.saved_per_image

    def largest_batch(self, budget: float) -> int:
        """Returns the largest batch whose peak fits, 0 if none does."""
        room = budget - self._static
        fitting = [math.floor((room - fixed) / each) for fixed, each in zip(self.constant, self.per_image) if each > 0]
        return max(0, min(fitting)) if room >= max(self.constant) else 0


def bench_memory(settings: Settings) -> list[Row]:
    """Computes the memory of a target, with and without grad checkpointing, and of RepVGG."""
    architecture = architecture_of(settings.model)
    meta = torch.device('meta')
    builders: dict[str, Callable[[], nn.Module]] = {
        settings.model.replace('repopt_vgg', 'repvgg'): lambda: repvgg(architecture, meta),
        settings.model: lambda: target(architecture, meta, scales=False),
        f'{settings.model}, grad checkpointing': lambda: target(architecture, meta, True, scales=False),
    }
    rows: list[Row] = []
    for img_size in settings.img_sizes:
        for precision in settings.precisions:
            for name, build in builders.items():
                cell = f'{img_size} px, {precision}'
                settings.report_progress(f'{name}, {cell}')
                rows += _rows(estimate(build, img_size, precision), name, cell, settings.batch_sizes)
    return rows


def estimate(build: Callable[[], nn.Module], img_size: int, precision: str = 'float32') -> StepMemory:
    """Computes the memory of a model's training step from two runs without data.

    Args:
        build: Makes the model, on the device `meta`.
        img_size: Height and width of the images.
        precision: `float32`, or what autocast computes in.
    """
    # BatchNorm does not train on a single image of one pixel.
    small, large = (_simulate(build(), batch, img_size, precision) for batch in (2, 3))
    if len(small.live) != len(large.live):
        raise ValueError(
            f'A step makes {len(small.live)} operations with two images, but {len(large.live)} with three.'
        )
    per_image = [more - less for less, more in zip(small.live, large.live)]
    saved_per_image = large.saved - small.saved
    return StepMemory(
        parameters=small.parameters,
        buffers=small.buffers,
        constant=[live - 2 * each for live, each in zip(small.live, per_image)],
        per_image=per_image,
        saved_constant=small.saved - 2 * saved_per_image,
        saved_per_image=saved_per_image,
    )


@dataclass(frozen=True)
class _Simulation:
    parameters: int
    buffers: int
    live: list[int]
    saved: int


class _LiveMemory(TorchDispatchMode):
    """Follows which tensors exist: `live` has the memory of them all after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.live: list[int] = []
        self._now = 0
        self._storages = WeakIdKeyDictionary()

    def know(self, tensor: Tensor, counts: bool = True) -> None:
        """Counts a tensor's memory until it is freed, unless it is known already."""
        storage = tensor.untyped_storage()
        if storage in self._storages:
            return
        size = storage.nbytes() if counts else 0

        def free(_: Any) -> None:
            self._now -= size

        self._now += size
        self._storages[storage] = weakref.ref(storage, free)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.know, result)
        self.live.append(self._now)
        return result


def _simulate(model: nn.Module, batch: int, img_size: int, precision: str) -> _Simulation:
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True):
        # Autocast is not made for `meta`, so tensors pretend to be on a CPU.
        model.to_empty(device='cpu').train()
        images, labels = torch.empty(batch, 3, img_size, img_size), torch.empty(batch, dtype=torch.long)
        forward = forward_pass(model, images, labels, precision)
        saved = saved_bytes(model, forward, (images, labels))
        memory = _LiveMemory()
        for tensor in (*model.parameters(), *model.buffers()):
            memory.know(tensor, counts=False)
        memory.know(images)
        with memory:
            forward().backward()
    return _Simulation(parameters, static_bytes(model) - parameters, memory.live, saved)


def _rows(memory: StepMemory, name: str, cell: str, batches: Sequence[int]) -> list[Row]:
    rows = [
        Row(f'parameters, {cell}', name, memory.parameters, 'B'),
        Row(f'gradients, {cell}', name, memory.parameters, 'B'),
        Row(f'momentum, {cell}', name, memory.parameters, 'B'),
        Row(f'saved activations of an image, {cell}', name, memory.saved_per_image, 'B'),
    ]
    rows += [Row(f'saved activations, {cell}', name, memory.saved(batch), 'B', at=batch) for batch in batches]
    rows += [Row(f'peak of a step, {cell}', name, memory.peak(batch), 'B', at=batch) for batch in batches]
    for card in CARDS:
        budget = (1 - RESERVE) * card * _GIB
        rows.append(Row(f'largest batch, {cell}', name, memory.largest_batch(budget), 'images', at=card))
    return rows


def memory_table(rows: Sequence[Row]) -> str:
    """Writes the estimate as a table: what a step consists of, peaks for batch sizes, largest batches for GPUs."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        what, _, cell = row.what.partition(', ')
        line = lines.setdefault(f'{row.contender}, {cell}', {})
        if what == 'parameters':
            # Gradients and momentum are as large.
            line['weights'] = f'{3 * row.value / _GIB:.2f}'
        elif what == 'saved activations of an image':
            line['image'] = f'{row.value / _GIB:.3f}'
        elif what == 'peak of a step':
            line[f'batch {row.at:g}'] = f'{row.value / _GIB:.1f}'
        elif what == 'largest batch':
            line[f'fits {row.at:g} GiB'] = f'{row.value:g}'
    heads = list(next(iter(lines.values())))
    return markdown_table(('GiB', *heads), [(name, *line.values()) for name, line in lines.items()], align=True)
