"""Grad Mults, the Rule of Iteration (section 3.3 and appendix A of arXiv 2205.15242)."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .branches import Branch, centre, make_branches, margins
from .convolutions import kernel_of, refusal
from .csla import CSLAConv2d
from .initialization import (
    CarriedScales,
    ScalesMapping,
    branch_counts,
    carried_scales,
    check_network,
    geometry_of,
    network_name,
    scaled_conv,
)
from .modules import modules_of, uncompiled_name, unwrap
from .vectors import check_vectors
from .vectors import fingerprint as fingerprint_of

__all__ = ['UPDATE_RULES', 'GradMult', 'GradMults', 'make_grad_mults']

UPDATE_RULES = {'sgd': 2, 'adamw': 1}
"""Update rule to the power of |s_b| in its Grad Mult."""


# Tiles make products along contiguous kernels vectorize; this is the most of a kernel's size that they may take.
_TILE_SHARE = 1 / 16
_TILE_CHANNELS = 16


@dataclass(frozen=True)
class GradMult:
    """The Grad Mult of one kernel of shape (O, I/g, k_h, k_w): `M = sum_b |s_b|^power M_b`.

    Off the (group-wise) channel diagonal M is the same for all input channels, so that a thin tile stands for it.

    Attributes:
        taps: M off the diagonal, shape (O, t, k_h, k_w) with a t that divides I/g: input channels repeat it.
        diagonal: What is added on the centred taps of the diagonal, shape (O, 1, h, w), if anything is.
        channels: Input channels of a group, I/g.
        first_row: Output channel of the kernel that the first row belongs to.
    """

    taps: Tensor
    diagonal: Tensor | None
    channels: int
    first_row: int = 0

    def rows(self, start: int, stop: int) -> 'GradMult':
        """Returns the Grad Mult of the output channels `start` to `stop`."""
        if (start, stop) == (0, len(self.taps)):
            return self
        diagonal = None if self.diagonal is None else self.diagonal[start:stop]
        return GradMult(self.taps[start:stop], diagonal, self.channels, self.first_row + start)

    def weighted(self, weights: Tensor) -> 'GradMult':
        """Returns the Grad Mult times a weight for each output channel, shape (O,)."""
        column = weights.to(self.taps).view(-1, 1, 1, 1)
        return replace(
            self, taps=self.taps * column, diagonal=None if self.diagonal is None else self.diagonal * column
        )

    def tiled(self) -> 'GradMult':
        """Returns the same Grad Mult with the taps repeated as often as a small share of the kernel's size allows."""
        most = min(_TILE_CHANNELS, int(self.channels * _TILE_SHARE)) if self.taps[0].numel() > 1 else 1
        width = max((size for size in range(1, most + 1) if self.channels % size == 0), default=1)
        return replace(self, taps=self.taps.expand(-1, width, -1, -1).contiguous()) if width > 1 else self

    def filled(self, kernel: Tensor) -> 'GradMult':
        """Returns the same Grad Mult as a mask of the kernel's size, which lies in memory like the kernel."""
        mask = torch.empty_like(kernel, dtype=self.taps.dtype, requires_grad=False).copy_(self.dense())
        return GradMult(mask, None, self.channels, self.first_row)

    def to(self, device: torch.device) -> 'GradMult':
        """Returns the same Grad Mult on a device."""
        diagonal = None if self.diagonal is None else self.diagonal.to(device)
        return replace(self, taps=self.taps.to(device), diagonal=diagonal)

    @property
    def nbytes(self) -> int:
        """Memory that it holds, in bytes."""
        return self.taps.nbytes + (0 if self.diagonal is None else self.diagonal.nbytes)

    def dense(self) -> Tensor:
        """Returns M as a mask that broadcasts to the kernel."""
        mask = self.taps
        if mask.shape[1] > 1:
            mask = mask.repeat(1, self.channels // mask.shape[1], 1, 1)
        if self.diagonal is None:
            return mask
        rows = torch.arange(len(mask), device=mask.device) + self.first_row
        columns = torch.arange(self.channels, device=mask.device)
        on_diagonal = (rows[:, None] % self.channels == columns)[:, :, None, None]
        top, left = margins(mask.shape[2:], self.diagonal.shape[2:])
        return mask + torch.where(on_diagonal, F.pad(self.diagonal, (left, left, top, top)), 0.0)

    def multiply(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns `M * grad` in `grad`'s dtype, computed in float32 or better; where it can, without making M.

        Args:
            grad: Tensor of the kernel's shape.
            out: Memory of the same shape and dtype that may be taken for the product.
        """
        if not self._works_in_place(grad):
            exact = grad.to(torch.promote_types(grad.dtype, self.taps.dtype))
            return (exact * self.dense()).to(grad.dtype)
        product = torch.empty_like(grad) if out is None else out
        (whole, tile, target), *diagonal = zip(self._parts(grad), self._factors, self._parts(product))
        torch.mul(whole, tile, out=target)
        for part, factor, target in diagonal:
            target.addcmul_(part, factor)
        return product

    def add_multiple(self, kernel: Tensor, update: Tensor) -> None:
        """Adds `M * update` to a kernel in place."""
        if not self._works_in_place(update):
            kernel.add_(self.multiply(update))
            return
        for target, part, factor in zip(self._parts(kernel), self._parts(update), self._factors):
            target.addcmul_(part, factor)

    def _works_in_place(self, tensor: Tensor) -> bool:
        # A compiler fuses the mask into what reads it, and neither it nor autograd is served by writing to views.
        plain = not (torch.compiler.is_compiling() or tensor.requires_grad)
        return plain and tensor.dtype == self.taps.dtype and self._diagonal_is_a_view

    @functools.cached_property
    def _diagonal_is_a_view(self) -> bool:
        size, column = len(self.taps), self.first_row % self.channels
        return self.diagonal is None or column + size <= self.channels or (column == 0 and size % self.channels == 0)

    @functools.cached_property
    def _factors(self) -> tuple[Tensor, ...]:
        """What `_parts` of a tensor are multiplied with."""
        tile = self.taps if self.taps.shape[1] in (1, self.channels) else self.taps.unsqueeze(1)
        if self.diagonal is None:
            return (tile,)
        per_group = min(len(self.taps), self.channels)
        return tile, self.diagonal.view(-1, per_group, *self.diagonal.shape[2:])

    def _parts(self, kernel: Tensor) -> Iterator[Tensor]:
        """Yields views of a tensor of the kernel's shape: all of it, by tiles, then the diagonals of its groups."""
        tile, *diagonal = self._factors
        yield kernel if tile.ndim == 4 else kernel.unflatten(1, (-1, tile.shape[2]))
        for factor in diagonal:
            rows, columns, *taps = kernel.stride()
            top, left = margins(kernel.shape[2:], factor.shape[2:])
            first = kernel.storage_offset() + self.first_row % self.channels * columns + top * taps[0] + left * taps[1]
            yield kernel.as_strided(factor.shape, (factor.shape[1] * rows, rows + columns, *taps), first)


class GradMults(Mapping[Tensor, GradMult]):
    """Parameter to Grad Mult, on the parameter's device, for one update rule, and where the scales come from.

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
        mult = self._mults[parameter]
        if mult.taps.device != parameter.device:
            # The model has moved since.
            mult = self._mults[parameter] = mult.to(parameter.device)
        return mult

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._mults)

    def __len__(self) -> int:
        return len(self._mults)

    def name_of(self, parameter: Tensor) -> str:
        """Returns the name of a kernel's convolution, for messages."""
        return self._names.get(parameter, f'a kernel of shape {tuple(parameter.shape)}')

    def of(self, parameters: Iterable[Tensor]) -> 'GradMults':
        """Returns the Grad Mults of some of the parameters, for an optimizer of these alone."""
        own = set(parameters)
        mults = {kernel: mult for kernel, mult in self._mults.items() if kernel in own}
        return GradMults(mults, self.update_rule, self.fingerprint, self._names)

    def folded(self, factors: Mapping[Tensor, Tensor]) -> 'GradMults':
        """Returns the Grad Mults of kernels that a constant BatchNorm was folded into: `M |c|^power` for `c W`.

        A step of the folded kernel is then `c` times the step of W, gradient and weight decay alike.

        Args:
            factors: Folded kernel to its factors c, shape (O,).
        """
        power = UPDATE_RULES[self.update_rule]
        mults = {
            kernel: mult.weighted(factors[kernel].abs().pow(power)) if kernel in factors else mult
            for kernel, mult in self._mults.items()
        }
        return GradMults(mults, self.update_rule, self.fingerprint, self._names)


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
        scales: Module name to branch name to vector of shape (O,). Defaults to what the convolutions carry.
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
        modules = modules_of(model)
        kernels = [_carrying_kernel(model, name, modules[name], each) for name, each in carried.items()]
    else:
        kernels = _named_kernels(model, scales)
        fingerprint = _fingerprint_on(model, scales, kernels)
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


def _fingerprint_on(model: nn.Module, scales: ScalesMapping, kernels: Sequence[_Kernel]) -> str:
    """Returns the fingerprint that scales have once a model carries them; on a graph, their own."""
    counts = {each.name: {branch.name: branch.count for branch in each.branches} for each in kernels}
    geometry = geometry_of(unwrap(model), scales)
    if len(geometry) == len(scales):
        return fingerprint_of(scales, getattr(scales, 'architecture', '') or network_name(model), geometry, counts)
    return getattr(scales, 'fingerprint', None) or fingerprint_of(scales, counts=counts)


def _carrying_kernel(model: nn.Module, name: str, conv: Any, carried: CarriedScales) -> _Kernel:
    if reason := refusal(conv):
        raise ValueError(
            f"'{name}' of {type(model).__name__} carries scales, but {reason}. Its Grad Mult would be lost: undo that, "
            f'or leave its scales out.'
        )
    return _Kernel(name, kernel_of(conv), make_branches(carried.counts, conv), carried.vectors)


def _check_complete(model: nn.Module, carried: Mapping[str, CarriedScales]) -> None:
    """Raises a ValueError if a convolution got scales, and another module has taken its place since."""
    modules = modules_of(model)
    # Names of what carries scales, and of what contains that.
    covered = {name.rsplit('.', end)[0] for name in carried for end in range(name.count('.') + 1)}
    for name, each in carried.items():
        prefix = name.removesuffix(each.module)
        if prefix + each.module != name:
            continue
        for sibling in each.siblings:
            # A part of the network, such as a backbone without its last stage, may lack some or have an Identity.
            replaced = modules.get(prefix + sibling)
            if not isinstance(replaced, nn.Identity | None) and prefix + sibling not in covered:
                raise ValueError(
                    f"'{prefix + sibling}' of {type(model).__name__} got scales, but a {type(replaced).__name__} "
                    f'without them has taken its place. Attach the scales after replacing modules.'
                )


def _named_kernels(model: nn.Module, scales: ScalesMapping) -> list[_Kernel]:
    inner = unwrap(model)
    if not isinstance(inner, torch.fx.GraphModule):
        check_network(inner, scales)
    modules = modules_of(inner)
    params = {uncompiled_name(name): param for name, param in inner.named_parameters()}
    source = getattr(scales, 'source', '') or 'The scales'
    geometry = getattr(scales, 'geometry', {})
    kernels = []
    for name, vectors in scales.items():
        if isinstance(modules.get(name), nn.Conv2d):
            found = scaled_conv(model, name, modules[name], scales)
            kernels.append(_Kernel(name, kernel_of(found.conv), found.branches, vectors))
            continue
        weight = params.get(f'{name}.weight')
        # What is left of a module in an exported graph is a plain holder of its parameters.
        known = type(modules.get(name, nn.Module())) is nn.Module
        if weight is None or weight.ndim != 4 or not known:
            raise ValueError(
                f"{source}: there are scales for a convolution '{name}', but {type(model).__name__} has neither such "
                f"a convolution nor a parameter '{name}.weight' of four dimensions. Scales go by module name: use this "
                f"network's."
            )
        if name in geometry and not geometry[name].has_kernel(weight.shape):
            raise ValueError(
                f"{source}: the scales were searched with '{name}' of {geometry[name]}, but its kernel here has the "
                f'shape {tuple(weight.shape)}. Use the scales of this network.'
            )
        check_vectors(name, vectors, len(weight), source=source)
        counts = branch_counts(scales, name)
        try:
            branches = tuple(Branch.of(branch, weight.shape[2:], count) for branch, count in counts.items())
        except ValueError as error:
            raise ValueError(f"{source}: module '{name}': {error}") from None
        if 'identity' in counts and name not in geometry and weight.shape[0] != weight.shape[1]:
            raise ValueError(
                f"{source}: module '{name}' has an identity branch, but its kernel of shape {tuple(weight.shape)} does "
                f'not show whether it has as many input as output channels. Give scales.for_model(model), made with '
                f'the plain model.'
            )
        kernels.append(_Kernel(name, weight, branches, vectors))
    return kernels


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
    taps = torch.zeros((weight.shape[0], 1, *weight.shape[2:]), device=weight.device, dtype=dtype)
    diagonal = torch.zeros_like(taps)
    window = (0, 0)
    for branch in kernel.branches:
        added = torch.full((), branch.count, device=weight.device, dtype=dtype)
        if branch.scaled:
            vector = kernel.vectors[branch.name].to(weight.device, dtype)
            added = branch.count * vector.abs().pow(power).view(-1, 1, 1, 1)
        on_diagonal = branch.diagonal and weight.shape[1] > 1
        centre(diagonal if on_diagonal else taps, branch.kernel_size).add_(added)
        if on_diagonal:
            window = (max(window[0], branch.kernel_size[0]), max(window[1], branch.kernel_size[1]))
    return GradMult(taps, centre(diagonal, window).clone() if any(window) else None, weight.shape[1])
