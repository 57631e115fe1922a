"""What RepOptSGD and RepOptAdamW share: their Grad Mults, and stepping through kernels in chunks."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import _use_grad_for_differentiable

from ..reparam import GradMult, GradMults
from .compiled import MaskParts, mask_parts
from .sharding import local, local_rows

__all__ = ['CHUNK_SIZES', 'GradMultOptimizer', 'Update', 'as_scalars', 'gradient', 'gradients', 'multiply', 'rows_of']

CHUNK_SIZES = {'cpu': 2**20, 'cuda': 2**24}
"""Device type to elements of a chunk: what a step works in, on top of what it keeps.

On a CPU few enough that products are still in the cache when the update reads them and enough that calls do not count,
on a GPU enough for few launches.
"""

Update = tuple[Callable[..., None], tuple[Any, ...]]


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


def rows_of(param: Tensor, mult: GradMult, whole: bool = False) -> list[Rows]:
    """Cuts a kernel, or what this process holds of it, into rows of about the size of a chunk, or leaves it whole."""
    start, stop = local_rows(param)
    mult, total, row = mult.rows(start, stop), stop - start, math.prod(param.shape[1:])
    count = max(1, total if whole else _chunk_size(param) // row)
    if mult.channels < count < total:
        # Of whole groups the diagonals are one view.
        count -= count % mult.channels
    spans = [(first, min(first + count, total)) for first in range(0, total, count)]
    return [
        Rows(param, first, last, (last - first) * row, last == total, mult.rows(first, last)) for first, last in spans
    ]


def _chunk_size(param: Tensor) -> int:
    return CHUNK_SIZES.get(param.device.type, CHUNK_SIZES['cpu'])


def gradient(param: Tensor) -> Tensor:
    """Returns the gradient of a parameter that has one, or the part of it that this process holds."""
    assert param.grad is not None
    return local(param.grad)


def gradients(params: Iterable[Tensor], fused: bool | None) -> list[Tensor]:
    """Returns gradients, for fused kernels laid out in memory like their parameters, as those take them to be."""
    grads = [(local(param), gradient(param)) for param in params]
    alike = [not fused or grad.is_sparse or grad.stride() == param.stride() for param, grad in grads]
    return [grad if ok else torch.empty_like(param).copy_(grad) for ok, (param, grad) in zip(alike, grads)]


def multiply(mults: list[GradMult], grads: list[Tensor], out: list[Tensor] | None) -> list[Tensor]:
    """Multiplies tensors with Grad Mults, in lists where those are masks of the kernels' size."""
    if all(mult.taps.shape == grad.shape for mult, grad in zip(mults, grads)) and grads[0].is_cuda:
        return list(torch._foreach_mul(grads, [mult.taps for mult in mults]))
    if out is None:
        return [mult.multiply(grad) for mult, grad in zip(mults, grads)]
    return [mult.multiply(grad, place) for mult, grad, place in zip(mults, grads, out)]


def is_packed(tensor: Tensor) -> bool:
    """Tells whether a tensor has no gaps and its rows lie in memory one after the other."""
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


@dataclass(frozen=True)
class Chunk:
    """Rows of kernels that are stepped together, and memory for what is computed on the way.

    Attributes:
        rows: The rows.
        places: Lists of a tensor for each of the rows, or nothing where memory is the compiler's business.
    """

    rows: list[Rows]
    places: list[list[Tensor] | None]

    @property
    def mults(self) -> list[GradMult]:
        """Grad Mult of each of the rows."""
        return [rows.mult for rows in self.rows]

    def each(self, get: Callable[[Tensor], Tensor | None]) -> list[Any]:
        """Returns what a function returns for a kernel, each of the rows of it."""
        found = [get(rows.param) for rows in self.rows]
        return [value if value is None else rows.of(value) for rows, value in zip(self.rows, found)]


class GradMultOptimizer(torch.optim.Optimizer):
    """Mixin for an optimizer of `torch.optim` that multiplies gradients with Grad Mults.

    `_updates_of` lists what to do for those parameters of a group that have gradients: functions of tensors and plain
    settings, in which `torch.compile` sees one graph.
    """

    update_rule: str
    grad_mults: GradMults
    _settings: tuple[str, ...]
    _compiler_settings: ClassVar[dict[str, Any]]
    _updates_of: Callable[[dict[str, Any], list[Tensor], bool], list[Update]]

    def _take_grad_mults(self, grad_mults: GradMults | None, compiled: bool, dense: bool) -> None:
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
        params = {param for group in self.param_groups for param in group['params']}
        if params.isdisjoint(grad_mults):
            raise ValueError(
                f'None of the {len(params)} parameters given to {name} has a Grad Mult: it would train them as without '
                f'scales. Make the Grad Mults from the very model whose parameters these are.'
            )
        missing = [grad_mults.name_of(param) for param in grad_mults if param.requires_grad and param not in params]
        if missing:
            raise ValueError(
                f'{len(missing)} trainable kernels have a Grad Mult but are in no parameter group of {name}, so that '
                f'they would not train: {", ".join(missing)}. Add them, or freeze them with requires_grad_(False).'
            )
        if compiled and self.defaults['differentiable']:
            raise ValueError(f'{name} cannot be compiled and differentiable: leave one of them out.')
        self.grad_mults = grad_mults
        self._compiled = compiled
        self._dense = dense
        self.defaults['scales_fingerprint'] = grad_mults.fingerprint
        for group in self.param_groups:
            group['scales_fingerprint'] = grad_mults.fingerprint
        self._prepare()

    def _prepare(self) -> None:
        self._rows: dict[Tensor, list[Rows]] = {}
        self._parts: dict[Tensor, MaskParts] = {}
        # GradScaler leaves unscaling and skipping to fused kernels, without waiting for the device.
        self._step_supports_amp_scaling = not self._compiled and all(map(_use_fused, self.param_groups))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, which are multiplied if they have Grad Mults; warns of kernels without one."""
        super().add_param_group(param_group)
        if not hasattr(self, 'grad_mults'):
            return
        self._prepare()
        kernels = [param for param in self.param_groups[-1]['params'] if param.ndim == 4]
        bare = [str(tuple(param.shape)) for param in kernels if param not in self.grad_mults]
        if bare:
            warnings.warn(
                f'{len(bare)} kernels of the new group have no Grad Mult, {type(self).__name__} trains them as without '
                f'scales: {", ".join(bare)}. If their convolutions carry scales, make Grad Mults and optimizer anew.',
                stacklevel=2,
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
        updates: list[Update] = []
        for group in self.param_groups:
            fused, grad_scale, found_inf = _use_fused(group), *(getattr(self, name, None) for name in _SCALER_SETTINGS)
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
        if param not in self._parts:
            self._parts[param] = mask_parts(self.grad_mults[param].rows(*local_rows(param)), local(param))
        return self._parts[param]

    def _chunks(self, params: Iterable[Tensor], whole: bool, places: int = 1) -> list[Chunk]:
        """Cuts the kernels among parameters into chunks, or puts together whole ones of one device and dtype.

        Args:
            params: Parameters.
            whole: Make chunks of whole kernels, for a compiler, which needs no place for products.
            places: How many times memory of a chunk's size is needed.
        """
        lists: dict[Any, list[list[Rows]]] = {}
        for param in params:
            if param in self.grad_mults:
                chunks = lists.setdefault((param.device, param.dtype), [[]])
                for rows in self._rows_of(param, whole):
                    if chunks[-1] and not whole and _size(chunks[-1]) + rows.size > _chunk_size(param):
                        chunks.append([])
                    chunks[-1].append(rows)
        made = []
        for (device, dtype), chunks in lists.items():
            # Once for all chunks: new memory would be cold.
            size = 0 if whole else max(map(_size, chunks))
            memory = [torch.empty(size, device=device, dtype=dtype) for _ in range(places)]
            made += [Chunk(rows, [None if whole else _carve(each, rows) for each in memory]) for rows in chunks]
        return made

    def _rows_of(self, param: Tensor, whole: bool) -> list[Rows]:
        if whole:
            return rows_of(param, self.grad_mults[param], whole=True)
        if param not in self._rows:
            mult = self.grad_mults[param]
            if self._dense:
                mult = mult.filled(param)
            elif param.device.type == 'cpu' and local(param).is_contiguous():
                mult = mult.tiled()
            self._rows[param] = rows_of(param, mult)
        return self._rows[param]

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
        on_device = group.get('capturable') or _use_fused(group) or self._compiled
        return param.device if on_device else torch.device('cpu')

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


_SCALER_SETTINGS = ('grad_scale', 'found_inf')


def _use_fused(group: dict[str, Any]) -> bool | None:
    """Tells whether to take torch's fused kernels: as asked for, else wherever they work."""
    if group['fused'] is not None or group['foreach'] is not None or group['differentiable']:
        return group['fused']
    return all(
        param.device.type in CHUNK_SIZES
        and param.is_floating_point()
        and is_packed(local(param))
        and not (param.grad is not None and param.grad.is_sparse)
        for param in group['params']
    )


def _size(rows: Sequence[Rows]) -> int:
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
