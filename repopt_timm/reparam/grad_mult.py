"""Grad Mults, the Rule of Iteration (section 3.3 and appendix A of arXiv 2205.15242)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .branches import Branch, make_branches
from .convolutions import kernel_of, refusal
from .csla import CSLAConv2d
from .initialization import CarriedScales, ScalesMapping, branch_counts, carried_scales, scaled_conv
from .vectors import check_vectors
from .vectors import fingerprint as fingerprint_of

__all__ = ['UPDATE_RULES', 'GradMult', 'GradMults', 'MaskParts', 'dense_mask', 'make_grad_mults']

UPDATE_RULES = {'sgd': 2, 'adamw': 1}
"""Update rule to the power of |s_b| in its Grad Mult."""


Taps = tuple[slice, slice]
MaskParts = tuple[Tensor, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor, Tensor]]]


@dataclass(frozen=True)
class Support:
    """Where a branch adds to a Grad Mult, and what.

    Attributes:
        taps: Height and width of the window in the kernel.
        vector: What is added for each output channel, shape (O, 1, 1, 1).
        pattern: The support in one row of the kernel, shape (1, I/g, k_h, k_w). Of a window: 1 on its taps, else 0. Of
            a diagonal: the input channel on its taps, else -1, int32.
    """

    taps: Taps
    vector: Tensor
    pattern: Tensor

    def rows(self, start: int, stop: int) -> 'Support':
        """Returns the part for the output channels `start` to `stop`."""
        return Support(self.taps, self.vector[start:stop], self.pattern)


@dataclass(frozen=True)
class GradMult:
    """The Grad Mult of one kernel of shape (O, I/g, k_h, k_w): `M = sum_b |s_b|^power M_b`.

    Every branch adds one number per output channel on its support, so that a few vectors stand for the dense mask.

    Attributes:
        base: What is added everywhere, shape (O, 1, 1, 1).
        windows: What is added on some taps for all input channels.
        diagonals: What is added on some taps of the (group-wise) channel diagonal.
        first_row: Output channel of the kernel that the first row belongs to.
    """

    base: Tensor
    windows: tuple[Support, ...]
    diagonals: tuple[Support, ...]
    first_row: int = 0

    def rows(self, start: int, stop: int) -> 'GradMult':
        """Returns the Grad Mult of the output channels `start` to `stop`."""
        windows = tuple(window.rows(start, stop) for window in self.windows)
        diagonals = tuple(diagonal.rows(start, stop) for diagonal in self.diagonals)
        return GradMult(self.base[start:stop], windows, diagonals, self.first_row + start)

    @property
    def nbytes(self) -> int:
        """Memory that it holds, in bytes."""
        supports = (*self.windows, *self.diagonals)
        tensors = [self.base, *(tensor for support in supports for tensor in (support.vector, support.pattern))]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def parts(self) -> MaskParts:
        """The arguments of `dense_mask`: plain data, which compiled code checks faster than objects."""
        windows = [(window.vector, window.pattern) for window in self.windows]
        rows = torch.arange(len(self.base), device=self.base.device, dtype=torch.int32) + self.first_row
        diagonals = [
            (diagonal.vector, diagonal.pattern, (rows % diagonal.pattern.shape[1]).view(-1, 1, 1, 1))
            for diagonal in self.diagonals
        ]
        return self.base, windows, diagonals

    def dense(self) -> Tensor:
        """Returns M as a mask that broadcasts to the kernel."""
        return dense_mask(*self.parts)

    def multiply(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns `M * grad` in `grad`'s dtype, computed in float32 or better, without making M.

        Args:
            grad: Tensor of the kernel's shape.
            out: Memory that may be taken for the product.
        """
        exact = grad.to(torch.promote_types(grad.dtype, self.base.dtype))
        # Sums are not made in a lower precision.
        product = torch.mul(exact, self.base, out=out if exact is grad else None)
        for window in self.windows:
            height, width = window.taps
            product[:, :, height, width].addcmul_(exact[:, :, height, width], window.vector)
        for diagonal in self.diagonals:
            for start, stop, column in _diagonal_runs(self.first_row, *grad.shape[:2]):
                index = (slice(start, stop), slice(column, column + stop - start), *diagonal.taps)
                on_diagonal = diagonal.vector[start:stop, 0, 0, 0]
                product[index].diagonal().addcmul_(exact[index].diagonal(), on_diagonal)
        return product.to(grad.dtype)


def dense_mask(
    base: Tensor,
    windows: Sequence[tuple[Tensor, Tensor]],
    diagonals: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> Tensor:
    """Makes M as a mask that broadcasts to the kernel; a compiler fuses it into what reads it.

    Args:
        base: See `GradMult`.
        windows: Vector and pattern of each, see `Support`.
        diagonals: Vector and pattern of each, and the input channel on the diagonal of each row, shape (O, 1, 1, 1).
    """
    mask = base
    for vector, pattern in windows:
        mask = mask + vector * pattern
    for vector, pattern, columns in diagonals:
        mask = mask + torch.where(pattern == columns, vector, 0.0)
    return mask


def _diagonal_runs(first_row: int, rows: int, channels: int) -> Iterator[tuple[int, int, int]]:
    """Yields `start`, `stop`, first input channel of the runs of rows that belong to one group of a convolution."""
    start = 0
    while start < rows:
        column = (first_row + start) % channels
        stop = min(start + channels - column, rows)
        yield start, stop, column
        start = stop


class GradMults(Mapping[Tensor, GradMult]):
    """Parameter to Grad Mult for one update rule, and where the scales come from.

    Attributes:
        update_rule: `sgd` or `adamw`.
        fingerprint: Identifies the scales that the Grad Mults were made of.
    """

    def __init__(
        self,
        mults: Mapping[Tensor, GradMult],
        update_rule: str,
        fingerprint: str,
        names: Mapping[Tensor, str] | None = None,
    ):
        self._mults = dict(mults)
        self._names = dict(names or {})
        self.update_rule = update_rule
        self.fingerprint = fingerprint

    def __getitem__(self, parameter: Tensor) -> GradMult:
        return self._mults[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._mults)

    def __len__(self) -> int:
        return len(self._mults)

    def name_of(self, parameter: Tensor) -> str:
        """Returns the name of a kernel's convolution, for messages."""
        return self._names.get(parameter, f'a kernel of shape {tuple(parameter.shape)}')


class _Kernel(NamedTuple):
    name: str
    weight: Tensor
    branches: tuple[Branch, ...]
    vectors: Mapping[str, Tensor]


def make_grad_mults(model: nn.Module, scales: ScalesMapping | None = None, update_rule: str = 'sgd') -> GradMults:
    """Makes the Grad Mults of a plain model's kernels.

    Args:
        model: The model, or any wrapper around it: convolutions are found wherever they are. With `scales` it may have
            no convolutions at all, as after `torch.export` or a pt2e preparation: kernels are then found by the name
            of the parameter, `<module>.weight`.
        scales: Module name to branch name to vector of shape (O,). Defaults to those that the convolutions carry.
        update_rule: `sgd` for the power 2, `adamw` for the power 1.

    Returns:
        Kernel to Grad Mult, `sum_b n_b |s_b|^power M_b` with the counts n_b, on the kernel's device, in float32 or the
        kernel's dtype if that is wider.

    Raises:
        ValueError: If no convolution has scales, a kernel with scales cannot be trained by them (pruned,
            weight-normalized, replaced, tied to one with other scales), the scales do not fit, the model is a
            Hyper-Search or CSLA model, whose branches already are scaled, or the update rule is unknown.
    """
    if update_rule not in UPDATE_RULES:
        raise ValueError(f"Unknown update rule '{update_rule}', expected one of {sorted(UPDATE_RULES)}.")
    _check_no_twin(model)
    if scales is None:
        carried = carried_scales(model)
        _check_complete(model, carried)
        fingerprint = '+'.join(sorted({each.fingerprint for each in carried.values()}))
        kernels = [_carrying_kernel(model, name, each) for name, each in carried.items()]
    else:
        counts = {name: branch_counts(scales, name) for name in scales}
        fingerprint = getattr(scales, 'fingerprint', None) or fingerprint_of(scales, counts=counts)
        kernels = _named_kernels(model, scales)
    if not kernels:
        raise ValueError(
            f'No convolution of {type(model).__name__} carries scales, so there is nothing to multiply its gradients '
            f"with. Create the model with scales=... (a file, 'hf-hub:user/repo', 'initial'), call attach_scales(), or "
            f'give make_grad_mults(model, scales) the scales, to find kernels by the names of parameters.'
        )
    _check_tied(kernels)
    power = UPDATE_RULES[update_rule]
    mults = {kernel.weight: _grad_mult(kernel, power) for kernel in kernels}
    return GradMults(mults, update_rule, fingerprint, {kernel.weight: kernel.name for kernel in kernels})


def _check_no_twin(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, CSLAConv2d) and any(p.requires_grad for p in module.parameters()):
            raise ValueError(
                f"'{name}' of {type(model).__name__} is a CSLA convolution: its branches are scaled already, Grad "
                f'Mults would scale them twice. Train it with an ordinary optimizer, or train to_plain(model).'
            )


def _carrying_kernel(model: nn.Module, name: str, carried: CarriedScales) -> _Kernel:
    conv: Any = model.get_submodule(name)
    if reason := refusal(conv):
        raise ValueError(
            f"'{name}' of {type(model).__name__} carries scales, but {reason}. Its Grad Mult would be lost: undo that, "
            f'or leave its scales out.'
        )
    return _Kernel(name, kernel_of(conv), make_branches(carried.counts, conv), carried.vectors)


def _check_complete(model: nn.Module, carried: Mapping[str, CarriedScales]) -> None:
    """Raises a ValueError if a convolution got scales, and another module has taken its place since."""
    modules = dict(model.named_modules())
    for name, each in carried.items():
        prefix = name.removesuffix(each.module)
        if prefix + each.module != name:
            continue
        for sibling in each.siblings:
            replaced = modules.get(prefix + sibling)
            # A part of the network, such as a backbone without its last stage, may lack some.
            if replaced is not None and prefix + sibling not in carried:
                raise ValueError(
                    f"'{prefix + sibling}' of {type(model).__name__} got scales, but a {type(replaced).__name__} "
                    f'without them has taken its place. Attach the scales after replacing modules.'
                )


def _named_kernels(model: nn.Module, scales: ScalesMapping) -> list[_Kernel]:
    # Wrappers for compilation and parallel training put these in front of names.
    modules = {_unwrapped(name): module for name, module in model.named_modules()}
    params = {_unwrapped(name): param for name, param in model.named_parameters()}
    source = getattr(scales, 'source', '') or 'The scales'
    kernels = []
    for name, vectors in scales.items():
        if isinstance(modules.get(name), nn.Conv2d):
            found = scaled_conv(model, name, modules[name], scales)
            kernels.append(_Kernel(name, kernel_of(found.conv), found.branches, vectors))
            continue
        original = f'{name}.parametrizations.weight.original'
        weight = params.get(f'{name}.weight', params.get(original))
        if weight is None or weight.ndim != 4:
            raise ValueError(
                f"{source} name a convolution '{name}', but {type(model).__name__} has neither such a convolution nor "
                f"a parameter '{name}.weight' of four dimensions. Scales go by module name: use those of this network."
            )
        check_vectors(name, vectors, len(weight), source=source)
        counts = branch_counts(scales, name)
        branches = tuple(Branch.of(branch, weight.shape[2:], count) for branch, count in counts.items())
        kernels.append(_Kernel(name, weight, branches, vectors))
    return kernels


def _unwrapped(name: str) -> str:
    return '.'.join(part for part in name.split('.') if part not in ('_orig_mod', 'module'))


def _check_tied(kernels: Sequence[_Kernel]) -> None:
    seen: dict[Tensor, _Kernel] = {}
    for kernel in kernels:
        other = seen.setdefault(kernel.weight, kernel)
        same = other.branches == kernel.branches and all(
            torch.equal(vector, other.vectors[name]) for name, vector in kernel.vectors.items()
        )
        if not same:
            raise ValueError(
                f"'{other.name}' and '{kernel.name}' share one kernel, but have different scales. Give both the same."
            )


def _grad_mult(kernel: _Kernel, power: int) -> GradMult:
    weight = kernel.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    base = torch.zeros((weight.shape[0], 1, 1, 1), device=weight.device, dtype=dtype)
    windows = []
    diagonals = []
    for branch in kernel.branches:
        added = torch.full_like(base, branch.count)
        if branch.scaled:
            vector = kernel.vectors[branch.name].to(weight.device, dtype)
            added = branch.count * vector.abs().pow(power).view(-1, 1, 1, 1)
        if branch.diagonal and weight.shape[1] > 1:
            channels = torch.arange(weight.shape[1], device=weight.device, dtype=torch.int32)
            diagonals.append(_support(branch, weight, added, channels.view(1, -1, 1, 1), outside=-1))
        elif branch.kernel_size == tuple(weight.shape[2:]):
            base += added
        else:
            windows.append(_support(branch, weight, added, torch.ones_like(base[:1]), outside=0))
    return GradMult(base, tuple(windows), tuple(diagonals))


def _support(branch: Branch, weight: Tensor, added: Tensor, inside: Tensor, outside: int) -> Support:
    starts = [(outer - inner) // 2 for outer, inner in zip(weight.shape[2:], branch.kernel_size)]
    height, width = (slice(start, start + size) for start, size in zip(starts, branch.kernel_size))
    pattern = inside.new_full((1, *weight.shape[1:]), outside)
    pattern[:, :, height, width] = inside
    if weight.stride(1) == 1:
        # A mask is read along with the kernel, fastest if both lie in memory alike.
        pattern = pattern.contiguous(memory_format=torch.channels_last)
    return Support((height, width), added, pattern)
