"""Grad Mults, the Rule of Iteration (section 3.3 and appendix A of arXiv 2205.15242)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .branches import Branch
from .csla import CSLAConv2d
from .initialization import ScalesMapping, carried_scales, scaled_convs
from .vectors import fingerprint_of

__all__ = ['UPDATE_RULES', 'GradMult', 'GradMults', 'make_grad_mults']

UPDATE_RULES = {'sgd': 2, 'adamw': 1}
"""Update rule to the power of |s_b| in its Grad Mult."""


Taps = tuple[slice, slice]


@dataclass(frozen=True)
class GradMult:
    """The Grad Mult of one kernel of shape (O, I/g, k_h, k_w): `M = sum_b |s_b|^power M_b`.

    Every branch adds one number per output channel on its support, so that a few vectors stand for the dense mask.

    Attributes:
        base: What is added everywhere, shape (O, 1, 1, 1).
        windows: What is added on some taps for all input channels: taps, vector of shape (O, 1, 1, 1).
        diagonals: What is added on some taps of the channel diagonal: taps, vector of shape (O, 1, 1).
        columns: The diagonal's input channel for each output channel, shape (O,), int64.
    """

    base: Tensor
    windows: tuple[tuple[Taps, Tensor], ...]
    diagonals: tuple[tuple[Taps, Tensor], ...]
    columns: Tensor

    def rows(self, start: int, stop: int) -> 'GradMult':
        """Returns the Grad Mult of the output channels `start` to `stop`."""
        windows = tuple((taps, vector[start:stop]) for taps, vector in self.windows)
        diagonals = tuple((taps, vector[start:stop]) for taps, vector in self.diagonals)
        return GradMult(self.base[start:stop], windows, diagonals, self.columns[start:stop])

    def multiply(self, grad: Tensor) -> Tensor:
        """Returns `M * grad` in `grad`'s dtype, computed in float32 or better."""
        exact = grad.to(torch.promote_types(grad.dtype, self.base.dtype))
        product = exact * self.base
        for (height, width), vector in self.windows:
            product[:, :, height, width].addcmul_(exact[:, :, height, width], vector)
        if self.diagonals:
            rows = torch.arange(grad.shape[0], device=grad.device)
            for (height, width), vector in self.diagonals:
                product[rows, self.columns, height, width] += exact[rows, self.columns, height, width] * vector
        return product.to(grad.dtype)

    def dense(self, shape: Sequence[int]) -> Tensor:
        """Returns M as a mask of the kernel's shape (O, I/g, k_h, k_w)."""
        return self.multiply(torch.ones(tuple(shape), device=self.base.device, dtype=self.base.dtype))


class GradMults(Mapping[Tensor, GradMult]):
    """Parameter to Grad Mult for one update rule, and where the scales come from.

    Attributes:
        update_rule: `sgd` or `adamw`.
        fingerprint: Identifies the scales that the Grad Mults were made of.
    """

    def __init__(self, mults: Mapping[Tensor, GradMult], update_rule: str, fingerprint: str):
        self._mults = dict(mults)
        self.update_rule = update_rule
        self.fingerprint = fingerprint

    def __getitem__(self, parameter: Tensor) -> GradMult:
        return self._mults[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._mults)

    def __len__(self) -> int:
        return len(self._mults)


def make_grad_mults(model: nn.Module, scales: ScalesMapping | None = None, update_rule: str = 'sgd') -> GradMults:
    """Makes the Grad Mults of a plain model's kernels.

    Args:
        model: The model, or any wrapper around it: convolutions are found wherever they are.
        scales: Module name to branch name to vector of shape (O,); those that the convolutions carry when left out.
        update_rule: `sgd` for the power 2, `adamw` for the power 1.

    Returns:
        Kernel to Grad Mult, on the kernel's device, in float32 or the kernel's dtype if that is wider.

    Raises:
        ValueError: If no convolution has scales, the scales do not fit, the model is a Hyper-Search or CSLA model,
            whose branches already are scaled, or the update rule is unknown.
    """
    if update_rule not in UPDATE_RULES:
        raise ValueError(f"Unknown update rule '{update_rule}', expected one of {sorted(UPDATE_RULES)}.")
    for name, module in model.named_modules():
        if isinstance(module, CSLAConv2d) and any(p.requires_grad for p in module.parameters()):
            raise ValueError(
                f"'{name}' of {type(model).__name__} is a CSLA convolution: its branches are scaled already, Grad "
                f'Mults would scale them twice. Train it with an ordinary optimizer, or train model.to_plain().'
            )
    if scales is None:
        carried = carried_scales(model)
        vectors: ScalesMapping = {name: scale.vectors for name, scale in carried.items()}
        fingerprint = '+'.join(sorted({scale.fingerprint for scale in carried.values()}))
    else:
        vectors, fingerprint = scales, fingerprint_of(scales)
    if not vectors:
        raise ValueError(
            f'No convolution of {type(model).__name__} carries scales, so there is nothing to multiply its gradients '
            f"with. Create the model with scales=... (a file, 'hf-hub:user/repo', 'initial'), or call attach_scales()."
        )
    power = UPDATE_RULES[update_rule]
    mults = {conv.weight: _grad_mult(conv, vectors[name], power) for name, conv in scaled_convs(model, vectors)}
    return GradMults(mults, update_rule, fingerprint)


def _grad_mult(conv: nn.Conv2d, vectors: Mapping[str, Tensor], power: int) -> GradMult:
    weight = conv.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    base = torch.zeros((weight.shape[0], 1, 1, 1), device=weight.device, dtype=dtype)
    windows = []
    diagonals = []
    for name, vector in vectors.items():
        branch = Branch.of(name, conv)
        added = vector.to(weight.device, dtype).abs().pow(power) if branch.scaled else torch.ones_like(base)
        if branch.diagonal:
            diagonals.append((_taps(branch, weight.shape), added.view(-1, 1, 1)))
        elif branch.kernel_size == tuple(weight.shape[2:]):
            base += added.view(-1, 1, 1, 1)
        else:
            windows.append((_taps(branch, weight.shape), added.view(-1, 1, 1, 1)))
    columns = torch.arange(weight.shape[0], device=weight.device) % weight.shape[1]
    return GradMult(base, tuple(windows), tuple(diagonals), columns)


def _taps(branch: Branch, kernel_shape: Sequence[int]) -> Taps:
    starts = [(outer - inner) // 2 for outer, inner in zip(kernel_shape[2:], branch.kernel_size)]
    height, width = (slice(start, start + size) for start, size in zip(starts, branch.kernel_size))
    return height, width
