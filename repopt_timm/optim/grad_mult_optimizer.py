"""What RepOptSGD and RepOptAdamW share: their Grad Mults, and stepping in blocks of a kernel's rows."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reparam import GradMult, GradMults

__all__ = ['Block', 'GradMultOptimizer', 'gradient', 'row_blocks', 'use_fused']

# Elements of a block. Small enough that multiplied gradients stay in the cache until the update reads them and cost no
# memory worth mentioning, large enough that the number of calls does not matter.
_BLOCK = 2**20


@dataclass(frozen=True)
class Block:
    """Some output channels of one kernel, and their Grad Mult."""

    param: Tensor
    start: int
    stop: int
    mult: GradMult

    def of(self, tensor: Tensor) -> Tensor:
        """Returns these rows of a tensor of the kernel's shape, as a view."""
        return tensor[self.start : self.stop]


def row_blocks(params: Iterable[Tensor], grad_mults: GradMults) -> Iterator[list[Block]]:
    """Cuts kernels into blocks of rows, and yields lists of them with about a million elements each."""
    blocks: list[Block] = []
    size = 0
    for param in params:
        row_size = param[0].numel()
        rows = max(1, _BLOCK // row_size)
        for start in range(0, len(param), rows):
            stop = min(start + rows, len(param))
            blocks.append(Block(param, start, stop, grad_mults[param].rows(start, stop)))
            size += (stop - start) * row_size
            if size >= _BLOCK:
                yield blocks
                blocks, size = [], 0
    if blocks:
        yield blocks


def gradient(param: Tensor) -> Tensor:
    """Returns the gradient of a parameter that has one."""
    assert param.grad is not None
    return param.grad


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
    """Mixin for an optimizer of `torch.optim` that multiplies gradients with Grad Mults."""

    update_rule: str
    grad_mults: GradMults

    def _take_grad_mults(self, grad_mults: GradMults | None) -> None:
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
        self.grad_mults = grad_mults
        self.defaults['scales_fingerprint'] = grad_mults.fingerprint
        for group in self.param_groups:
            group['scales_fingerprint'] = grad_mults.fingerprint
        # Multiplied gradients are copies, so GradScaler's way of unscaling inside the kernel does not apply.
        self._step_supports_amp_scaling = False

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
                if isinstance(value, Tensor) and value.shape == param.shape:
                    # As if it had been made for this parameter, whose memory format may have changed since.
                    state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), 'grad_mults': self.grad_mults}
