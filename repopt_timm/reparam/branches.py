"""The branch algebra of a CSLA convolution, `y = sum_b s_b * conv(x; A_b theta_b)` (section 3.1, arXiv 2205.15242).

A branch is described by its support in the kernel and by whether it has a scale. The Rule of Initialization and the
Grad Mult follow from `merge`.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modules import pair

__all__ = ['STARTS', 'Branch', 'BranchCounts', 'counted', 'draw_operators', 'embed', 'make_branches', 'merge']

BranchCounts = Mapping[str, int] | Iterable[str]
"""Branches by name: names, or name to the number of equal branches that share a scale."""

STARTS = ('paper', 'identity')
"""Starts of the operators, see `draw_operators`."""

_MAX_COUNT = 1000
_WINDOW = re.compile(r'([1-9]\d*)x([1-9]\d*)')


@dataclass(frozen=True)
class Branch:
    """One linear branch of a CSLA convolution, or several equal ones that share a scale.

    Attributes:
        name: `identity`, `kxk` or a window such as `1x1` or `1x3`.
        kernel_size: Height and width of the branch's own operator.
        diagonal: Whether the operator connects each channel with itself only.
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
        """Makes the branch called `name` of a kernel of height and width `kernel_size`.

        Raises:
            ValueError: If the name is unknown, the count is not one of 1 to 1000, or 1 for an identity, or the window
                does not fit the centre of the kernel.
        """
        height, width = kernel_size
        if type(count) is not int or not 1 <= count <= (1 if name == 'identity' else _MAX_COUNT):
            raise ValueError(f"The branch '{name}' has the count {count!r}: from 1 to {_MAX_COUNT}, 1 for an identity.")
        if name == 'kxk':
            return cls(name, (height, width), count=count)
        window = _WINDOW.fullmatch(name)
        if window is None and name != 'identity':
            raise ValueError(f"Unknown branch '{name}', expected 'identity', 'kxk' or a window such as '1x1' or '1x3'.")
        size = (int(window[1]), int(window[2])) if window else (1, 1)
        if any(outer % 2 == 0 or inner % 2 == 0 or inner > outer for inner, outer in zip(size, (height, width))):
            raise ValueError(f"A branch '{name}' does not fit the centre of a {height}x{width} kernel.")
        identity = name == 'identity'
        return cls(name, size, diagonal=identity, scaled=not identity, count=count)

    def operator_shape(self, kernel_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Returns the shape of the branch's operator in a kernel of shape (O, I/g, k_h, k_w).

        It is (O, I/g, h, w), or (O, 1, h, w) for a diagonal branch. n equal branches stand one after the other in
        (n O, I/g, h, w).
        """
        return self.count * kernel_shape[0], 1 if self.diagonal else kernel_shape[1], *self.kernel_size

    @torch.no_grad()
    def draw(self, kernel: Tensor) -> Tensor:
        """Returns a new operator: PyTorch's default initialization of `nn.Conv2d`, or ones for an identity.

        Args:
            kernel: Kernel of shape (O, I/g, k_h, k_w), for dtype, device and memory format; its values are not read.
        """
        operator = kernel.new_empty(self.operator_shape(kernel.shape))
        if kernel.is_contiguous(memory_format=torch.channels_last):
            operator = operator.contiguous(memory_format=torch.channels_last)
        return nn.init.kaiming_uniform_(operator, a=math.sqrt(5)) if self.scaled else nn.init.ones_(operator)


def counted(branches: BranchCounts) -> dict[str, int]:
    """Returns branch name to count, sorted by name.

    Raises:
        ValueError: If a name is listed twice, or there is no `kxk` branch.
    """
    if isinstance(branches, str):
        raise ValueError(f"The branches are the text '{branches}', expected a list such as ['{branches}'].")
    names = list(branches)
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"The branch '{name}' is listed twice. Equal branches have a count: {{'{name}': 2}}.")
    if 'kxk' not in names:
        raise ValueError(f"The branches {names} lack 'kxk', the one of the whole kernel, which each convolution has.")
    return {name: branches[name] if isinstance(branches, Mapping) else 1 for name in sorted(names)}


def make_branches(branches: BranchCounts, conv: Any) -> tuple[Branch, ...]:
    """Makes the branches of a convolution, sorted by name.

    Args:
        branches: Names or counts.
        conv: An `nn.Conv2d`, or its `Geometry`, whose input channels may be unknown.

    Raises:
        ValueError: If the convolution cannot have one of them. An identity needs equal channels and stride 1.
    """
    made = tuple(Branch.of(name, conv.kernel_size, count) for name, count in counted(branches).items())
    channels, stride = (conv.in_channels, conv.out_channels), pair(conv.stride)
    alike = channels[0] in (None, channels[1]) and stride == (1, 1)
    if any(branch.diagonal for branch in made) and not alike:
        raise ValueError(
            f'an identity branch needs as many input as output channels and stride 1, but the convolution has '
            f'{channels[0]} -> {channels[1]} channels and stride {stride[0]}x{stride[1]}'
        )
    return made


@torch.no_grad()
def draw_operators(
    branches: Sequence[Branch], kernel: Tensor, vectors: Mapping[str, Tensor] | None, start: str = 'paper'
) -> dict[str, Tensor]:
    """Draws the operators that a convolution starts from.

    Random numbers come from torch's global generator, in the order of the branches, and are the same for each start.

    Args:
        branches: The branches, sorted by name.
        kernel: Kernel of shape (O, I/g, k_h, k_w), for dtype, device and memory format; its values are not read.
        vectors: Branch name to scale of shape (O,), of which the identity's is the value that its operator starts at.
            Without any it starts at 1.
        start: `paper` draws all other operators as PyTorch initializes `nn.Conv2d`; `identity` sets them to zero where
            there is an identity branch, so that the convolution starts as that branch alone, unsearched as the
            identity (DiracNets, arXiv 1706.00388).

    Returns:
        Branch name to operator, see `Branch.operator_shape`.
    """
    operators = {branch.name: branch.draw(kernel) for branch in branches}
    if 'identity' in operators:
        if vectors is not None:
            operators['identity'].copy_(vectors['identity'].view(-1, 1, 1, 1))
        for branch in branches if start == 'identity' else ():
            if branch.scaled:
                operators[branch.name].zero_()
    return operators


def embed(operator: Tensor, kernel_shape: Sequence[int], branch: Branch) -> Tensor:
    """Embeds the operator of a branch in the kernel: `A_b theta_b`, the sum over equal branches.

    Args:
        operator: Tensor of shape `branch.operator_shape(kernel_shape)`.
        kernel_shape: Shape (O, I/g, k_h, k_w) of the whole kernel.
        branch: The branch.

    Returns:
        Tensor of shape `kernel_shape`, zero outside of the branch's support.
    """
    if branch.count > 1:
        operator = operator.unflatten(0, (branch.count, -1)).sum(0)
    if branch.diagonal:
        # The kernels of each group are square: entry (g, i, i) is on the diagonal.
        operator = torch.diag_embed(operator.reshape(-1, kernel_shape[1])).reshape(*kernel_shape[:2], 1, 1)
    top, left = ((outer - inner) // 2 for outer, inner in zip(kernel_shape[2:], branch.kernel_size))
    return F.pad(operator, (left, left, top, top)) if top or left else operator


def merge(
    branches: Sequence[Branch],
    operators: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    kernel_shape: Sequence[int],
) -> Tensor:
    """Merges the branches into one kernel: `W' = sum_b s_b * A_b theta_b`.

    Args:
        branches: The branches to add up; `kxk` is one of them.
        operators: Branch name to operator, see `Branch.operator_shape`.
        scales: Branch name to scale of shape (O,); entries of unscaled branches are ignored.
        kernel_shape: Shape (O, I/g, k_h, k_w) of the whole kernel.

    Returns:
        Kernel of shape `kernel_shape` and the operators' dtype, computed in float32 or better.
    """
    dtype = operators['kxk'].dtype
    exact = torch.promote_types(dtype, torch.float32)
    terms = []
    # The kernel takes its memory format from the first term.
    for branch in sorted(branches, key=lambda branch: branch.name != 'kxk'):
        term = embed(operators[branch.name].to(exact), kernel_shape, branch)
        if branch.scaled:
            term = term * scales[branch.name].to(term.device, exact).view(-1, 1, 1, 1)
        terms.append(term)
    return sum(terms[1:], terms[0]).to(dtype)
