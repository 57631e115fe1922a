"""Memory that a call allocates, and what a forward pass saves for the backward pass."""

import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

__all__ = ['Allocation', 'allocation', 'saved_bytes', 'static_bytes']


@dataclass(frozen=True)
class Allocation:
    """Memory that a call took from torch's allocator, in bytes.

    Attributes:
        held: What remained at the end, with the result still alive.
        peak: The most at any time.
        result: What the call returned.
    """

    held: int
    peak: int
    result: Any


def allocation(call: Callable[[], Any], device: torch.device) -> Allocation:
    """Calls something and measures the memory that it allocates.

    The allocator itself is asked, so temporaries inside kernels and allocations of compiled code count too. What
    libraries such as oneDNN and cuDNN allocate past it does not.

    Args:
        call: What is measured.
        device: Whose memory is measured, a CPU or a CUDA device.
    """
    gc.collect()
    return _cuda_allocation(call, device) if device.type == 'cuda' else _cpu_allocation(call)


def _cuda_allocation(call: Callable[[], Any], device: torch.device) -> Allocation:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device) - before
    return Allocation(held, torch.cuda.max_memory_allocated(device) - before, result)


def _cpu_allocation(call: Callable[[], Any]) -> Allocation:
    # Kineto reports its start, and a missing GPU, as if they were errors.
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    held = peak = 0
    for change in _memory_changes(profiler):
        held += change
        peak = max(peak, held)
    return Allocation(held, peak, result)


def _memory_changes(profiler: profile) -> list[int]:
    # Of the profiler's public formats only the trace has single allocations in order.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'trace.json'
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding='utf-8'))['traceEvents']
    memory = sorted((event for event in events if event['name'] == '[memory]'), key=lambda event: event['ts'])
    return [event['args']['Bytes'] for event in memory]


def static_bytes(model: nn.Module) -> int:
    """Returns the memory of parameters and buffers, in bytes."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def saved_bytes(model: nn.Module, forward: Callable[[], Any], inputs: Iterable[Tensor] = ()) -> int:
    """Runs a forward pass and returns the memory that it saves for the backward pass, in bytes.

    Tensors that share their memory count once; parameters, buffers and inputs, which exist anyway, do not count.

    Args:
        model: The model that is run.
        forward: Runs the model, and the loss.
        inputs: Images and labels.
    """
    there = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers(), *inputs)}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Kept, so that no later tensor gets the same storage. A tensor that its own graph saves would never be freed.
        tensor = tensor.detach()
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in saved.items() if storage not in there)
