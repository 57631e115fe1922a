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

BranchCounts = Mapping[str, int] | Iterable[str]
"""Branches by name: names, or name to the number of equal branches that share a scale."""

STARTS = ('paper', 'identity')
"""Starts of the operators, see `draw_operators`."""


@dataclass(frozen=True)
class Branch:
    """One linear branch of a CSLA convolution, or several equal ones that share a scale.

    Attributes:
        name: `identity`, `kxk` or a window such as `1x1` or `1x3`.
        kernel_size: Height and width of the branch's own operator.
        count: Number of equal branches.
    """

    name: str
    kernel_size: tuple[int, int]
    count: int = 1

    @classmethod
    def of(cls, name: str, kernel_size: Sequence[int], count: int = 1) -> 'Branch':
        """Makes the branch called `name` of a kernel of height and width `kernel_size`, or says why there is none."""
        if type(count) is not int or not 1 <= count <= (1 if name == 'identity' else 1000):
            raise ValueError(f"The branch '{name}' has the count {count!r}: expected 1 to 1000, or 1 for an identity.")
        height, width = kernel_size
        if name == 'kxk':
            return cls(name, (height, width), count)
        window = re.fullmatch(r'([1-9]\d*)x([1-9]\d*)', '1x1' if name == 'identity' else name)
        if window is None:
            raise ValueError(f"Unknown branch '{name}', expected 'identity', 'kxk' or a window such as '1x1' or '1x3'.")
        size = int(window[1]), int(window[2])
        if any(outer % 2 == 0 or inner % 2 == 0 or inner > outer for inner, outer in zip(size, (height, width))):
            raise ValueError(f"A branch '{name}' does not fit the centre of a {height}x{width} kernel.")
        return cls(name, size, count)

    @property
    def scaled(self) -> bool:
        """Whether the branch has a constant scale; an identity, whose operator is diagonal, counts with 1."""
        return self.name != 'identity'

    def operator_shape(self, kernel_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Returns the operator's shape for a kernel of shape (O, I/g, k_h, k_w).

        It is (n O, I/g, h, w), in which n equal branches stand one after the other; (O, 1, 1, 1) for an identity.
        """
        return self.count * kernel_shape[0], kernel_shape[1] if self.scaled else 1, *self.kernel_size


def make_branches(branches: BranchCounts, conv: Any) -> tuple[Branch, ...]:
    """Makes the branches of an `nn.Conv2d`, or of its `Geometry`, sorted by name.

    Raises:
        ValueError: If the convolution cannot have one of them, a name is listed twice, or there is no `kxk`. An
            identity needs equal channels and stride 1.
    """
    names = sorted(branches)
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"The branch '{name}' is listed twice. Equal branches have a count: {{'{name}': 2}}.")
    if 'kxk' not in names:
        raise ValueError(f"The branches {names} lack 'kxk', the one of the whole kernel, which each convolution has.")
    counts = branches if isinstance(branches, Mapping) else dict.fromkeys(names, 1)
    made = tuple(Branch.of(name, conv.kernel_size, counts[name]) for name in names)
    alike = conv.in_channels in (None, conv.out_channels) and pair(conv.stride) == (1, 1)
    if not alike and not all(branch.scaled for branch in made):
        raise ValueError(
            f'an identity branch needs equal channels and stride 1, the convolution has {conv.in_channels} -> '
            f'{conv.out_channels} channels and stride {pair(conv.stride)}'
        )
    return made


@torch.no_grad()
def draw_operators(
    branches: Sequence[Branch], kernel: Tensor, vectors: Mapping[str, Tensor] | None, start: str = 'paper'
) -> dict[str, Tensor]:
    """Draws the operators that a convolution starts from: branch name to tensor of `Branch.operator_shape`.

    Random numbers come from torch's global generator, in the order of the branches, and are the same for each start.

    Args:
        branches: The branches, sorted by name.
        kernel: Kernel of shape (O, I/g, k_h, k_w), for dtype, device and memory format; its values are not read.
        vectors: Branch name to vector of shape (O,); an identity's operator starts at its own, or at 1 without any.
        start: `paper` draws the other operators as PyTorch initializes `nn.Conv2d`; `identity` sets them to zero where
            there is an identity branch (DiracNets, arXiv 1706.00388).
    """
    has_identity = not all(branch.scaled for branch in branches)
    operators = {}
    for branch in branches:
        operator = kernel.new_empty(branch.operator_shape(kernel.shape))
        if kernel.is_contiguous(memory_format=torch.channels_last):
            operator = operator.contiguous(memory_format=torch.channels_last)
        if branch.scaled:
            nn.init.kaiming_uniform_(operator, a=math.sqrt(5))
            if has_identity and start == 'identity':
                operator.zero_()
        elif vectors is None:
            operator.fill_(1.0)
        else:
            operator.copy_(vectors[branch.name].view(-1, 1, 1, 1))
        operators[branch.name] = operator
    return operators


def embed(operator: Tensor, kernel_shape: Sequence[int], branch: Branch) -> Tensor:
    """Embeds an operator, or the sum of equal ones, in a kernel of shape (O, I/g, k_h, k_w): `A_b theta_b`."""
    if not branch.scaled:
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
    """Merges the branches into one kernel of shape (O, I/g, k_h, k_w): `W' = sum_b s_b * A_b theta_b`.

    Scales have the shape (O,); an identity's is ignored. The kernel has the operators' dtype, and is computed in
    float32 or better.
    """
    dtype = operators['kxk'].dtype
    exact = torch.promote_types(dtype, torch.float32)
    terms = []
    # The kernel takes its memory format from the first term.
    for branch in sorted(branches, key=lambda branch: branch.name != 'kxk'):
        operator = operators[branch.name].to(exact)
        if branch.count > 1:
            operator = operator.unflatten(0, (branch.count, -1)).sum(0)
        if branch.scaled:
            # Before it is embedded, as it may be a ninth of the kernel's size.
            operator = operator * scales[branch.name].to(operator.device, exact).view(-1, 1, 1, 1)
        terms.append(embed(operator, kernel_shape, branch))
    return sum(terms[1:], terms[0]).to(dtype)
