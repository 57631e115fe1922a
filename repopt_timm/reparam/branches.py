"""The branch algebra of a CSLA convolution, `y = sum_b s_b * conv(x; A_b theta_b)` (section 3.1, arXiv 2205.15242)."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .convolutions import pair

__all__ = [
    'Branch',
    'BranchCounts',
    'centre',
    'counted',
    'embed',
    'make_branches',
    'margins',
    'merge',
    'merge_backward',
    'support',
]

BranchCounts = Mapping[str, int] | Sequence[str]
"""Branches by name: names, or name to the number of equal branches that share a scale."""

_MAX_COUNT = 1000
_WINDOW = re.compile(r'([1-9]\d*)x([1-9]\d*)')


@dataclass(frozen=True)
class Branch:
    """One linear branch of a CSLA convolution, or several equal ones that share a scale.

    Attributes:
        name: `identity`, `kxk` or a window such as `1x1` or `1x3`.
        kernel_size: Height and width of the branch's own operator.
        diagonal: Whether the operator connects each channel with itself only, that is, has shape (O, 1, h, w).
        scaled: Whether the branch has a constant scale; an unscaled branch counts with 1.
        count: Number of equal branches.
    """

    name: str
    kernel_size: tuple[int, int]
    diagonal: bool = False
    scaled: bool = True
    count: int = 1

    @classmethod
    def of(cls, name: str, kernel_size: Sequence[int], count: int = 1) -> 'Branch':
        """Makes the branch called `name` of a kernel.

        Args:
            name: `identity`, `kxk` or a window.
            kernel_size: Height and width of the kernel.
            count: Number of equal branches.

        Raises:
            ValueError: If the name is unknown, the count is not one of 1 to 1000, or 1 for an identity, or the window
                does not fit the centre of the kernel.
        """
        height, width = kernel_size
        if type(count) is not int or not 1 <= count <= _MAX_COUNT:
            raise ValueError(
                f"The branch '{name}' has the count {count!r}, expected an integer from 1 to {_MAX_COUNT}."
            )
        if name == 'kxk':
            return cls(name, (height, width), count=count)
        if height % 2 == 0 or width % 2 == 0:
            raise ValueError(f"A branch '{name}' needs a centre, which a {height}x{width} kernel does not have.")
        if name == 'identity':
            if count > 1:
                raise ValueError(f'{count} identity branches are refused: give one, or 1x1 branches with a scale.')
            return cls(name, (1, 1), diagonal=True, scaled=False)
        window = _WINDOW.fullmatch(name)
        if window is None:
            raise ValueError(f"Unknown branch '{name}', expected 'identity', 'kxk' or a window such as '1x1' or '1x3'.")
        size = (int(window[1]), int(window[2]))
        if any(inner % 2 == 0 or inner > outer for inner, outer in zip(size, (height, width))):
            raise ValueError(f'A {name} branch does not fit the centre of a {height}x{width} kernel.')
        return cls(name, size, count=count)

    def operator_shape(self, kernel_shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of the branch's tensor in a kernel of shape (O, I/g, k_h, k_w).

        (O, I/g, h, w), or (O, 1, h, w) for a diagonal branch; with the count in front if it is above 1.
        """
        channels = 1 if self.diagonal else kernel_shape[1]
        shape = (kernel_shape[0], channels, *self.kernel_size)
        return shape if self.count == 1 else (self.count, *shape)

    @torch.no_grad()
    def draw_(self, operator: Tensor) -> Tensor:
        """Fills an operator with PyTorch's default initialization of `nn.Conv2d`, or with ones if it is an identity."""
        if not self.scaled:
            return nn.init.ones_(operator)
        for part in operator if self.count > 1 else (operator,):
            nn.init.kaiming_uniform_(part, a=math.sqrt(5))
        return operator


def counted(branches: BranchCounts) -> dict[str, int]:
    """Returns branch name to count, sorted by name.

    Raises:
        ValueError: If a name is listed twice, or the branches are empty.
    """
    if isinstance(branches, str):
        raise ValueError(f"The branches are the text '{branches}', expected a list such as ['{branches}'].")
    names = list(branches)
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"The branch '{name}' is listed {names.count(name)} times. Write {{'{name}': {names.count(name)}}} "
                f'for equal branches that share a scale.'
            )
    if not names:
        raise ValueError('A CSLA convolution needs at least one branch, such as kxk.')
    return {name: branches[name] if isinstance(branches, Mapping) else 1 for name in sorted(names)}


def make_branches(branches: BranchCounts, conv: nn.Conv2d) -> tuple[Branch, ...]:
    """Makes the branches of a convolution, sorted by name.

    Raises:
        ValueError: If the convolution cannot have one of them. An identity needs equal channels and stride 1.
    """
    made = tuple(Branch.of(name, conv.kernel_size, count) for name, count in counted(branches).items())
    for branch in made:
        if branch.diagonal and (conv.in_channels != conv.out_channels or pair(conv.stride) != (1, 1)):
            raise ValueError(
                f'An identity branch needs as many input as output channels and stride 1, but the convolution has '
                f'{conv.in_channels} -> {conv.out_channels} channels and stride {pair(conv.stride)}.'
            )
    return made


def margins(kernel_size: Sequence[int], window_size: Sequence[int]) -> tuple[int, int]:
    """Returns how many taps of a kernel lie above, and how many left of a centred window."""
    return (kernel_size[0] - window_size[0]) // 2, (kernel_size[1] - window_size[1]) // 2


def centre(kernel: Tensor, window_size: Sequence[int]) -> Tensor:
    """Returns the view of a kernel's centred window, shape (O, I/g, h, w)."""
    top, left = margins(kernel.shape[2:], window_size)
    return kernel[:, :, top : top + window_size[0], left : left + window_size[1]]


def support(kernel: Tensor, branch: Branch) -> Tensor:
    """Returns the view of a kernel's entries that a branch reaches.

    Args:
        kernel: Kernel of shape (O, I/g, k_h, k_w), or a tensor of that shape such as its gradient.
        branch: The branch.

    Returns:
        View of shape (O, I/g, h, w); of a diagonal branch (g, O/g, h, w).
    """
    window = centre(kernel, branch.kernel_size)
    if not branch.diagonal:
        return window
    group_channels = kernel.shape[1]
    return window.unflatten(0, (-1, group_channels)).diagonal(dim1=1, dim2=2).movedim(-1, 1)


def embed(operator: Tensor, kernel_shape: Sequence[int], branch: Branch) -> Tensor:
    """Embeds a branch's tensor in the kernel: `A_b theta_b`.

    Args:
        operator: Tensor of shape (O, I/g, h, w), or (O, 1, h, w) for a diagonal branch.
        kernel_shape: Shape (O, I/g, k_h, k_w) of the whole kernel.
        branch: The branch.

    Returns:
        Tensor of shape `kernel_shape`, zero outside of the branch's support.
    """
    kernel = operator.new_zeros(tuple(kernel_shape))
    part = support(kernel, branch)
    part += operator.reshape(part.shape)
    return kernel


def merge(
    branches: Sequence[Branch],
    operators: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    kernel_shape: Sequence[int],
) -> Tensor:
    """Merges the branches into one kernel: `W' = sum_b s_b * A_b theta_b`.

    Args:
        branches: The branches to add up.
        operators: Branch name to operator, see `Branch.operator_shape`.
        scales: Branch name to scale of shape (O,); entries of unscaled branches are ignored.
        kernel_shape: Shape (O, I/g, k_h, k_w) of the whole kernel.

    Returns:
        Kernel of shape `kernel_shape` and the operators' dtype.
    """
    dtype = operators[branches[0].name].dtype
    exact = torch.promote_types(dtype, torch.float32)
    # The largest first: the others are added to it in place.
    kernel = None
    for branch in sorted(branches, key=lambda branch: branch.name != 'kxk'):
        term = operators[branch.name].to(exact)
        if branch.count > 1:
            term = term.sum(0)
        if branch.scaled:
            term = term * scales[branch.name].to(term.device, exact).view(-1, 1, 1, 1)
        if kernel is None:
            kernel = term if branch.name == 'kxk' else embed(term, kernel_shape, branch)
            continue
        part = support(kernel, branch)
        part += term.reshape(part.shape)
    assert kernel is not None
    return kernel.to(dtype)


def merge_backward(
    branches: Sequence[Branch],
    operators: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    grad_kernel: Tensor,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits the gradient of a merged kernel into those of operators and scales.

    Args:
        branches: The branches that were added up.
        operators: Branch name to operator.
        scales: Branch name to scale of shape (O,).
        grad_kernel: Gradient of the kernel, in float32 or better; overwritten unless autograd records.

    Returns:
        Branch name to gradient of its operator, in the operator's shape and `grad_kernel`'s dtype, and branch name to
        gradient of its scale.
    """
    exact = grad_kernel.dtype
    in_place = not torch.is_grad_enabled()
    grad_operators, grad_scales = {}, {}
    # The largest last: its gradient takes the kernel's place.
    for branch in sorted(branches, key=lambda branch: branch.name == 'kxk'):
        operator = operators[branch.name]
        part = support(grad_kernel, branch)
        if branch.scaled:
            scale = scales[branch.name].to(part.device, exact).view(-1, 1, 1, 1)
            total = operator.sum(0) if branch.count > 1 else operator
            grad_scales[branch.name] = torch.einsum('oihw,oihw->o', part, total.to(exact))
            part = part.mul_(scale) if in_place and branch.name == 'kxk' else part * scale
        else:
            part = part.clone()
        single = operator.shape[1:] if branch.count > 1 else operator.shape
        grad_operators[branch.name] = part.reshape(single).expand(operator.shape)
    return grad_operators, grad_scales
