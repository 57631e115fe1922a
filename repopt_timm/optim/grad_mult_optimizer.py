"""What RepOptSGD and RepOptAdamW share: their Grad Mults, and stepping in blocks of a kernel's rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _use_grad_for_differentiable

from ..reparam import GradMult, GradMults
from ..reparam.grad_mult import MaskParts
from .sharding import local, local_rows

__all__ = ['Block', 'GradMultOptimizer', 'gradient', 'hyperparameter', 'use_fused']

# Elements of a block. Small enough that multiplied gradients stay in the cache until the update reads them and cost no
# memory worth mentioning, large enough that the number of calls does not matter.
_BLOCK = 2**20


@dataclass(frozen=True)
class Block:
    """Some output channels of one kernel, and their Grad Mult.

    Attributes:
        param: The kernel.
        start: First row, of those that this process holds.
        stop: Row after the last.
        mult: Grad Mult of the rows.
    """

    param: Tensor
    start: int
    stop: int
    mult: GradMult

    def of(self, tensor: Tensor) -> Tensor:
        """Returns these rows of a tensor of the kernel's shape, as a view."""
        return local(tensor)[self.start : self.stop]


def gradient(param: Tensor) -> Tensor:
    """Returns the gradient of a parameter that has one, or the part of it that this process holds."""
    assert param.grad is not None
    return local(param.grad)


def hyperparameter(value: float | Tensor, param: Tensor) -> Tensor:
    """Makes a scalar tensor of a setting: compiled code is not made anew when its value changes.

    Of float32 for a kernel of float32, which arithmetic in float64 would slow down.
    """
    return torch.as_tensor(value, dtype=torch.promote_types(param.dtype, torch.float32))


def use_fused(group: dict[str, Any], params: Sequence[Tensor], *others: Sequence[Tensor | None]) -> bool | None:
    """Tells whether to take torch's fused kernels: as asked for, else wherever they work.

    Args:
        group: Parameter group.
        params: Parameters that are stepped together.
        others: Their gradients and states; the kernels on the CPU take them to lie in memory like the parameters.
    """
    if group['fused'] is not None or group['foreach'] is not None or group['differentiable']:
        return group['fused']
    for param, *rest in zip(params, *others):
        if param.device.type not in ('cpu', 'cuda') or not param.is_floating_point():
            return False
        if any(tensor is not None and (tensor.is_sparse or tensor.stride() != param.stride()) for tensor in rest):
            return False
    return True


class GradMultOptimizer(torch.optim.Optimizer):
    """Mixin for an optimizer of `torch.optim` that multiplies gradients with Grad Mults.

    `_step_group` updates those parameters of a group that have gradients.
    """

    update_rule: str
    grad_mults: GradMults
    _step_group: Callable[[dict[str, Any], list[Tensor]], None]

    def _take_grad_mults(self, grad_mults: GradMults | None, compiled: bool) -> None:
        name = type(self).__name__
        if not isinstance(grad_mults, GradMults):
            raise ValueError(
                f'{name} needs grad_mults=make_grad_mults(model, update_rule={self.update_rule!r}), but got '
                f'{type(grad_mults).__name__}. From bare parameters it cannot tell which kernel has which scales.'
            )
        if grad_mults.update_rule != self.update_rule:
            raise ValueError(
                f'{name} got Grad Mults for the update rule {grad_mults.update_rule!r}, expected {self.update_rule!r}: '
                f'make them with make_grad_mults(model, update_rule={self.update_rule!r}).'
            )
        params = [param for group in self.param_groups for param in group['params']]
        if not any(param in grad_mults for param in params):
            raise ValueError(
                f'None of the {len(params)} parameters given to {name} has a Grad Mult: it would train them as without '
                f'scales. Make the Grad Mults from the very model whose parameters these are.'
            )
        if compiled and self.defaults['differentiable']:
            raise ValueError(f'{name} cannot be compiled and differentiable: leave one of them out.')
        self.grad_mults = grad_mults
        self._compiled = compiled
        self._forget_buffers()
        self.defaults['scales_fingerprint'] = grad_mults.fingerprint
        for group in self.param_groups:
            group['scales_fingerprint'] = grad_mults.fingerprint
        # Multiplied gradients are copies, so GradScaler's way of unscaling inside the kernel does not apply.
        self._step_supports_amp_scaling = False

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step; gradients stay as they are.

        Args:
            closure: Evaluates the model again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group, [param for param in group['params'] if param.grad is not None])
        return loss

    def _forget_buffers(self) -> None:
        self._parts: dict[Tensor, MaskParts] = {}
        self._blocks: dict[Tensor, list[Block]] = {}
        self._memory: dict[Any, Tensor] = {}

    def _local_mult(self, param: Tensor) -> GradMult:
        return self.grad_mults[param].rows(*local_rows(param))

    def _mask_parts(self, param: Tensor) -> MaskParts:
        if param not in self._parts:
            self._parts[param] = self._local_mult(param).parts
        return self._parts[param]

    def _blocks_of(self, param: Tensor) -> list[Block]:
        if param not in self._blocks:
            mult, size = self._local_mult(param), len(local(param))
            rows = max(1, _BLOCK // param[0].numel())
            spans = [(start, min(start + rows, size)) for start in range(0, size, rows)]
            self._blocks[param] = [Block(param, start, stop, mult.rows(start, stop)) for start, stop in spans]
        return self._blocks[param]

    def _row_blocks(self, params: Iterable[Tensor]) -> Iterator[list[Block]]:
        """Cuts kernels into blocks of rows, and yields lists of them with about a million elements each."""
        blocks: list[Block] = []
        room = _BLOCK
        for param in params:
            row_size = param[0].numel()
            for block in self._blocks_of(param):
                size = (block.stop - block.start) * row_size
                if blocks and size > room:
                    yield blocks
                    blocks, room = [], _BLOCK
                blocks.append(block)
                room -= size
        if blocks:
            yield blocks

    def _like(self, tensors: Sequence[Tensor], purpose: str) -> list[Tensor | None]:
        """Returns memory that lies like the tensors, the same at each call: allocating takes longer than a block does.

        There is none for a tensor with gaps, and none to be differentiated.
        """
        places: list[Tensor | None] = []
        used = 0
        for tensor in tensors:
            key = (purpose, tensor.device, tensor.dtype)
            if key not in self._memory:
                self._memory[key] = tensor.new_empty(_BLOCK)
            memory, size = self._memory[key], tensor.numel()
            dense = tensor.stride(0) * len(tensor) == size
            if not dense or used + size > len(memory) or self.defaults['differentiable']:
                places.append(None)
                continue
            places.append(memory.as_strided(tensor.shape, tensor.stride(), used))
            used += size
        return places

    def _multiply(self, blocks: Sequence[Block], tensors: Sequence[Tensor], purpose: str) -> list[Tensor]:
        """Multiplies rows of kernels with their Grad Mults; the products last until the next call."""
        places = self._like(tensors, purpose)
        return [block.mult.multiply(tensor, out) for block, tensor, out in zip(blocks, tensors, places)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of a run with the same scales.

        Raises:
            ValueError: If the state was saved with other scales, or by an optimizer without any.
        """
        for group in state_dict['param_groups']:
            found = group.get('scales_fingerprint')
            expected = self.grad_mults.fingerprint
            if found != expected:
                raise ValueError(
                    f'The optimizer state was saved with the scales {found}, but this {type(self).__name__} has '
                    f'{expected}. Resume with the scales that the run was started with.'
                )
        super().load_state_dict(state_dict)
        for param, state in self.state.items():
            for name, value in state.items():
                if name == 'step' and param.device.type == 'cuda':
                    # Torch leaves it where it was read unless `fused` was asked for, which is the default here.
                    state[name] = value.to(param.device)
                elif isinstance(value, Tensor) and value.shape == param.shape:
                    # As if it had been made for this parameter, whose memory format may have changed since.
                    state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), 'grad_mults': self.grad_mults, '_compiled': self._compiled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_buffers()
