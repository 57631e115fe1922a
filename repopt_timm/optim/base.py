"""Common ground of RepOptSGD and RepOptAdamW: which kernels are multiplied, and the checks that none is forgotten."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..reparam import GradMults, is_sharded


def local(tensor: Any) -> Tensor:
    """Returns the part of a DTensor that this process holds, without copying; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


class GradMultOptimizer(torch.optim.Optimizer):
    """Mixin for an optimizer of `torch.optim` whose gradients are multiplied with Grad Mults."""

    update_rule: str
    grad_mults: GradMults

    def __init__(self, *args: Any, grad_mults: GradMults | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.defaults.get('differentiable'):
            raise ValueError(f'{type(self).__name__} has no differentiable step: it multiplies gradients in place.')
        self.take_grad_mults(grad_mults)

    def take_grad_mults(self, grad_mults: GradMults | None) -> None:
        """Sets the Grad Mults.

        Call it again with new ones if other tensors have replaced the parameters, as Accelerate does under FSDP2.

        Args:
            grad_mults: What `make_grad_mults(model, update_rule=...)` returned for the parameters in the groups.

        Raises:
            ValueError: If they are missing, belong to other parameters or to another update rule, or a trainable kernel
                that has a Grad Mult is in no group.
        """
        name, make = type(self).__name__, f'make_grad_mults(model, update_rule={self.update_rule!r})'
        if grad_mults is None:
            raise ValueError(
                f'{name} needs grad_mults={make}: bare parameters do not tell which kernel has which scales.'
            )
        if grad_mults.update_rule != self.update_rule:
            raise ValueError(f'{name} got Grad Mults for the update rule {grad_mults.update_rule!r}. Use {make}.')
        self.grad_mults = grad_mults
        self._check_groups()
        params = {param for group in self.param_groups for param in group['params']}
        if params.isdisjoint(grad_mults):
            # A head may be trained alone, on another copy of a frozen model.
            self._warn_of_bare_kernels(params, stacklevel=4)
        self.defaults['scales_fingerprint'] = grad_mults.fingerprint
        for group in self.param_groups:
            group['scales_fingerprint'] = grad_mults.fingerprint

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, which are multiplied if they have Grad Mults; warns of kernels without one."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group['fused'] is None and group['foreach'] is None:
            # Torch's constructor would set `_step_supports_amp_scaling`: GradScaler would not unscale gradients, and
            # they could not be clipped.
            group['fused'] = not group.get('dampening') and all(map(_can_be_fused, group['params']))
        if hasattr(self, 'grad_mults'):
            self._warn_of_bare_kernels(group['params'], stacklevel=3)

    def _warn_of_bare_kernels(self, params: Iterable[Tensor], stacklevel: int) -> None:
        bare = [str(tuple(param.shape)) for param in params if param.ndim == 4 and param not in self.grad_mults]
        if bare:
            warnings.warn(
                f'{len(bare)} kernels have no Grad Mult, {type(self).__name__} trains them as usual, without scales: '
                f'{", ".join(bare)}. If their convolutions carry scales, make Grad Mults and optimizer anew.',
                stacklevel=stacklevel,
            )

    def _check_groups(self) -> None:
        """Raises a ValueError if a trainable kernel is in no group: its replacement would train without Grad Mult."""
        params = {param for group in self.param_groups for param in group['params']}
        names = [self.grad_mults.name_of(each) for each in self.grad_mults if each.requires_grad and each not in params]
        if names:
            raise ValueError(
                f'{len(names)} trainable kernels have a Grad Mult but are in no parameter group of '
                f'{type(self).__name__}: {", ".join(names)}. Make the Grad Mults from the very model whose parameters '
                f'these are. If other tensors have taken their place, as under Accelerate with FSDP2, call '
                f'optimizer.take_grad_mults(make_grad_mults(model, update_rule={self.update_rule!r})). Otherwise add '
                f'the kernels, or freeze them with requires_grad_(False).'
            )

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _multiply(self) -> list[Tensor]:
        """Multiplies gradients in place, `g <- M * g`, and returns the kernels that they belong to."""
        self._check_groups()
        kernels = []
        for group in self.param_groups:
            for param in group['params']:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    # Torch's fused kernels do not take them.
                    group['fused'] = False
                elif group['fused']:
                    self._lay_out_alike(param)
                if param in self.grad_mults:
                    kernels.append(param)
        if kernels:
            grads = [local(kernel.grad) for kernel in kernels]
            torch._foreach_mul_(grads, [local(self.grad_mults[kernel]) for kernel in kernels])
        return kernels

    def _lay_out_alike(self, param: Any) -> None:
        # Torch's fused kernels assume one memory layout for all tensors, and otherwise pair the wrong entries.
        if param.grad.stride() != param.stride():
            param.grad = torch.empty_like(param).copy_(param.grad)
        for name, value in self.state.get(param, {}).items():
            if isinstance(value, Tensor) and value.shape == param.shape and value.stride() != param.stride():
                self.state[param][name] = torch.empty_like(param, dtype=value.dtype).copy_(value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of a run with the same scales.

        Raises:
            ValueError: If the state was saved with other scales, or by an optimizer without any.
        """
        for group in state_dict['param_groups']:
            found, expected = group.get('scales_fingerprint'), self.grad_mults.fingerprint
            if found != expected:
                raise ValueError(
                    f'The optimizer state was saved with the scales {found}, but this {type(self).__name__} has '
                    f'{expected}. Resume with the scales that the run was started with.'
                )
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), 'grad_mults': self.grad_mults}


def _can_be_fused(param: Tensor) -> bool:
    # Torch's fused SGD does not take DTensors, and before 2.14 leaves half-precision parameters on a CPU as they are.
    exact = param.dtype in (torch.float32, torch.float64)
    return not is_sharded(param) and (param.device.type == 'cuda' or (param.device.type == 'cpu' and exact))
