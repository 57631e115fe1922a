"""What RepOptSGD and RepOptAdamW share: their Grad Mults, and stepping through kernels in chunks."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import _use_grad_for_differentiable

from ..reparam import GradMults
from .chunks import CHUNK_SIZES, Chunk, Rows, chunks_of, is_packed, rows_of
from .compiled import MaskParts, mask_parts
from .sharding import local, local_rows

__all__ = ['GradMultOptimizer', 'Update', 'as_scalars', 'gradient', 'gradients']

Update = tuple[Callable[..., None], tuple[Any, ...]]

_SCALER_SETTINGS = ('grad_scale', 'found_inf')


def gradient(param: Tensor) -> Tensor:
    """Returns the gradient of a parameter that has one, or the part of it that this process holds."""
    assert param.grad is not None
    return local(param.grad)


def gradients(params: Iterable[Tensor], fused: bool | None) -> list[Tensor]:
    """Returns gradients, for fused kernels laid out in memory like their parameters, as those take them to be."""
    grads = [(local(param), gradient(param)) for param in params]
    alike = [not fused or grad.is_sparse or grad.stride() == param.stride() for param, grad in grads]
    return [grad if ok else torch.empty_like(param).copy_(grad) for ok, (param, grad) in zip(alike, grads)]


class GradMultOptimizer(torch.optim.Optimizer):
    """Mixin for an optimizer of `torch.optim` that multiplies gradients with Grad Mults.

    `_updates_of` lists what to do for those parameters of a group that have gradients: functions of tensors and plain
    settings, in which `torch.compile` sees one graph. `_places` is how many times a step needs memory of a chunk's
    size, `_not_fused` are dtypes, by device, for which no fused kernels are taken.
    """

    update_rule: str
    grad_mults: GradMults
    _checked: list[list[int]]
    _settings: tuple[str, ...]
    _places: int
    _not_fused: ClassVar[dict[str, tuple[torch.dtype, ...]]] = {}
    _compiler_settings: ClassVar[dict[str, Any]]
    _updates_of: Callable[[dict[str, Any], list[Tensor], bool], list[Update]]

    def _set_up(self, grad_mults: GradMults | None, compiled: bool, dense: bool) -> None:
        name = type(self).__name__
        if not isinstance(grad_mults, GradMults):
            raise ValueError(
                f'{name} needs grad_mults=make_grad_mults(model, update_rule={self.update_rule!r}), but got '
                f'{type(grad_mults).__name__}. From bare parameters it cannot tell which kernel has which scales.'
            )
        if compiled and self.defaults['differentiable']:
            raise ValueError(f'{name} cannot be compiled and differentiable: leave one of them out.')
        self._compiled = compiled
        self._dense = dense
        self.take_grad_mults(grad_mults)

    def take_grad_mults(self, grad_mults: GradMults) -> None:
        """Takes Grad Mults made anew, after other tensors have replaced the model's in the groups.

        Accelerate replaces them when it shards with FSDP2.

        Args:
            grad_mults: What `make_grad_mults(model, update_rule=...)` returned for the parameters in the groups.

        Raises:
            ValueError: If they belong to other parameters or to another update rule, or a trainable kernel that has a
                Grad Mult is in no group.
        """
        name = type(self).__name__
        if grad_mults.update_rule != self.update_rule:
            raise ValueError(
                f'{name} got Grad Mults for the update rule {grad_mults.update_rule!r}, expected {self.update_rule!r}: '
                f'make them with make_grad_mults(model, update_rule={self.update_rule!r}).'
            )
        params = {param for group in self.param_groups for param in group['params']}
        missing = self._missing_kernels(grad_mults)
        if missing and params.isdisjoint(grad_mults):
            raise ValueError(
                f'None of the {len(params)} parameters given to {name} has a Grad Mult: it would train them as without '
                f'scales. Make the Grad Mults from the very model whose parameters these are.'
            )
        if missing:
            raise ValueError(
                f'{len(missing)} trainable kernels have a Grad Mult but are in no parameter group of {name}, so that '
                f'they would not train: {", ".join(missing)}. Add them, or freeze them with requires_grad_(False).'
            )
        self.grad_mults = grad_mults
        self.defaults['scales_fingerprint'] = grad_mults.fingerprint
        for group in self.param_groups:
            group['scales_fingerprint'] = grad_mults.fingerprint
        self._prepare()
        if params.isdisjoint(grad_mults):
            # As when a head is trained alone; kernels may be those of another copy of a frozen model.
            self._warn_of_bare_kernels(params, 'of all groups', stacklevel=5)

    def _missing_kernels(self, grad_mults: GradMults) -> list[str]:
        """Returns the names of trainable kernels that are in no group."""
        params = {param for group in self.param_groups for param in group['params']}
        return [grad_mults.name_of(param) for param in grad_mults if param.requires_grad and param not in params]

    def _check_groups(self) -> None:
        """Raises a ValueError if kernels have left the groups: what replaced them would train as without scales."""
        identities = [list(map(id, group['params'])) for group in self.param_groups]
        if identities == self._checked:
            return
        if missing := self._missing_kernels(self.grad_mults):
            raise ValueError(
                f'{len(missing)} trainable kernels have a Grad Mult but are in no parameter group of '
                f'{type(self).__name__} any more: {", ".join(missing)}. If other tensors have taken their place, as '
                f'under Accelerate with FSDP2, call optimizer.take_grad_mults(make_grad_mults(model, '
                f'update_rule={self.update_rule!r})); otherwise add them, or freeze them with requires_grad_(False).'
            )
        self._checked = identities

    def _prepare(self) -> None:
        # A parameter may move to another device.
        self._rows: dict[tuple[Tensor, torch.device], list[Rows]] = {}
        self._parts: dict[tuple[Tensor, torch.device], MaskParts] = {}
        self._checked = []
        # GradScaler then leaves unscaling and skipping to fused kernels, without waiting for the device. Like torch's
        # own optimizers only on demand: whoever clips gradients needs them unscaled before the step.
        asked = all(group['fused'] and self._use_fused(group) for group in self.param_groups)
        self._step_supports_amp_scaling = asked and not self._compiled

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, which are multiplied if they have Grad Mults; warns of kernels without one."""
        super().add_param_group(param_group)
        if not hasattr(self, 'grad_mults'):
            return
        self._prepare()
        self._warn_of_bare_kernels(self.param_groups[-1]['params'], 'of the new group', stacklevel=3)

    def _warn_of_bare_kernels(self, params: Iterable[Tensor], where: str, stacklevel: int) -> None:
        bare = [str(tuple(param.shape)) for param in params if param.ndim == 4 and param not in self.grad_mults]
        if bare:
            warnings.warn(
                f'{len(bare)} kernels {where} have no Grad Mult, {type(self).__name__} trains them as without scales: '
                f'{", ".join(bare)}. If their convolutions carry scales, make Grad Mults and optimizer anew.',
                stacklevel=stacklevel,
            )

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step; gradients stay as they are, but `torch.amp.GradScaler` may have some of them unscaled.

        Args:
            closure: Evaluates the model again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for update, arguments in self._updates(torch.compiler.is_compiling()):
            update(*arguments)
        return loss

    @torch.compiler.disable
    def _updates(self, compiling: bool) -> list[Update]:
        self._check_groups()
        updates: list[Update] = []
        for group in self.param_groups:
            fused = self._use_fused(group)
            grad_scale, found_inf = (getattr(self, name, None) for name in _SCALER_SETTINGS)
            if grad_scale is not None and not fused:
                raise RuntimeError(
                    f'GradScaler leaves unscaling to {type(self).__name__}, whose fused kernels do not take sparse '
                    f'gradients. Make the optimizer with fused=False.'
                )
            settings = {name: group[name] for name in self._settings}
            settings.update(fused=fused, grad_scale=grad_scale, found_inf=found_inf)
            if compiling:
                settings.update(self._compiler_settings)
            params = [param for param in group['params'] if param.grad is not None]
            updates += self._updates_of(settings, params, compiling or self._compiled)
        return updates

    def _parts_of(self, param: Tensor) -> MaskParts:
        key = param, param.device
        if key not in self._parts:
            self._parts[key] = mask_parts(self.grad_mults[param].rows(*local_rows(param)), local(param))
        return self._parts[key]

    def _chunks(self, params: Iterable[Tensor], whole: bool) -> list[Chunk]:
        """Puts the kernels among parameters into chunks, for a compiler whole and without memory to work in."""
        kernels = (param for param in params if param in self.grad_mults)
        rows = (rows for param in kernels for rows in self._rows_of(param, whole))
        return chunks_of(rows, 0 if whole else self._places)

    def _rows_of(self, param: Tensor, whole: bool) -> list[Rows]:
        if whole:
            return rows_of(param, self.grad_mults[param], places=0)
        key = param, param.device
        if key not in self._rows:
            mult = self.grad_mults[param]
            if self._dense:
                mult = mult.filled(param)
            elif param.device.type == 'cpu' and local(param).is_contiguous():
                mult = mult.tiled()
            self._rows[key] = rows_of(param, mult, self._places)
        return self._rows[key]

    def _state_of(self, param: Tensor, name: str) -> Tensor | None:
        """Returns a parameter's state, laid out in memory like the parameter, which may have changed since."""
        value = self.state[param].get(name)
        if value is not None and value.stride() != param.stride():
            value = self.state[param][name] = torch.empty_like(param, dtype=value.dtype).copy_(value)
        return local(value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of a run with the same scales; nothing is shared with it.

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
        for group in self.param_groups:
            for param in group['params']:
                state = self.state.get(param, {})
                for name, value in state.items():
                    if name == 'step':
                        state[name] = torch.empty_like(value, device=self._step_device(group, param)).copy_(value)
                    elif isinstance(value, Tensor):
                        state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)
        self._prepare()

    def _step_device(self, group: dict[str, Any], param: Tensor) -> torch.device:
        # As torch.optim has it: where kernels read it, but on the CPU where Python does.
        on_device = group.get('capturable') or self._use_fused(group) or self._compiled
        return param.device if on_device else torch.device('cpu')

    def _use_fused(self, group: dict[str, Any]) -> bool | None:
        """Tells whether to take torch's fused kernels: as asked for, else wherever they work."""
        # The settings of a step have no parameters, and `fused` is decided there.
        params = group.get('params', ())
        if any(param.dtype in self._not_fused.get(param.device.type, ()) for param in params):
            return False
        if group['fused'] is not None or group['foreach'] is not None or group['differentiable']:
            return group['fused']
        return all(
            param.device.type in CHUNK_SIZES
            and param.is_floating_point()
            and is_packed(local(param))
            and not (param.grad is not None and param.grad.is_sparse)
            for param in params
        )

    def __getstate__(self) -> dict[str, Any]:
        ours = {name: getattr(self, name) for name in ('grad_mults', '_compiled', '_dense')}
        return {**super().__getstate__(), **ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if hasattr(self, 'grad_mults'):
            self._prepare()


def as_scalars(settings: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """Makes scalar tensors of the numbers among settings: compiled code is not made anew when a value changes.

    Of float32 for a kernel of float32, which arithmetic in float64 would slow down.
    """
    dtype = torch.promote_types(param.dtype, torch.float32)
    numbers = {name: value for name, value in settings.items() if isinstance(value, int | float | Tensor)}
    scalars = {name: torch.as_tensor(value, dtype=dtype) for name, value in numbers.items()}
    return {**settings, **scalars}
