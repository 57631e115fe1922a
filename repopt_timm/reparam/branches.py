"""The branch algebra of a CSLA convolution, `y = sum_b s_b * conv(x; A_b theta_b)` (section 3.1, arXiv 2205.15242)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['Branch', 'branch_names', 'embed', 'merge']

_WINDOW = re.compile(r'([1-9]\d*)x([1-9]\d*)')


@dataclass(frozen=True)
class Branch:
    """One linear branch of a CSLA convolution.

    Attributes:
        name: `identity`, `kxk` or a window such as `1x1` or `1x3`.
        kernel_size: Height and width of the branch's own operator.
        diagonal: Whether the operator connects each channel with itself only, that is, has shape (O, 1, h, w).
        scaled: Whether the branch has a constant scale; an unscaled branch counts with 1.
    """

    name: str
    kernel_size: tuple[int, int]
    diagonal: bool = False
    scaled: bool = True

    @classmethod
    def of(cls, name: str, conv: nn.Conv2d) -> 'Branch':
        """Builds the branch called `name` of the convolution `conv`.

        Raises:
            ValueError: If `conv` cannot have such a branch. A window can be embedded at the centre of a kernel only
                when all sizes are odd and the padding is `dilation * (kernel_size - 1) / 2`.
        """
        if name == 'kxk':
            return cls(name, _pair(conv.kernel_size))
        _check_centred(name, conv)
        if name == 'identity':
            if conv.in_channels != conv.out_channels or _pair(conv.stride) != (1, 1):
                raise ValueError(
                    f'An identity branch needs as many input as output channels and stride 1, but the convolution '
                    f'has {conv.in_channels} -> {conv.out_channels} channels and stride {tuple(conv.stride)}.'
                )
            return cls(name, (1, 1), diagonal=True, scaled=False)
        window = _WINDOW.fullmatch(name)
        if window is None:
            raise ValueError(
                f"Unknown branch '{name}'. Known are 'identity', 'kxk' and windows such as '1x1' or '1x3'."
            )
        size = (int(window[1]), int(window[2]))
        kernel_size = _pair(conv.kernel_size)
        if any(inner % 2 == 0 or inner > outer for inner, outer in zip(size, kernel_size)):
            raise ValueError(f'A {name} branch does not fit the centre of a {kernel_size} kernel.')
        return cls(name, size)

    def operator(
        self, conv: nn.Conv2d, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> nn.Conv2d:
        """Makes the branch's trainable operator, with PyTorch's default initialization.

        The identity branch is a depthwise 1x1 of ones, trainable like every other operator.
        """
        operator = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            self.kernel_size,
            groups=conv.out_channels if self.diagonal else conv.groups,
            bias=False,
            device=device,
            dtype=dtype,
        )
        if not self.scaled:
            nn.init.ones_(operator.weight)
        return operator


def branch_names(
    in_channels: int, out_channels: int, kernel_size: Sequence[int], stride: Sequence[int]
) -> tuple[str, ...]:
    """Names the branches that a RepOpt-VGG block gives a convolution, in sorted order."""
    names = ['kxk']
    if tuple(kernel_size) != (1, 1):
        names.append('1x1')
    if in_channels == out_channels and tuple(stride) == (1, 1):
        names.append('identity')
    return tuple(sorted(names))


def embed(operator: Tensor, kernel_shape: Sequence[int], diagonal: bool = False) -> Tensor:
    """Embeds a branch's tensor in the kernel: `A_b theta_b`.

    Args:
        operator: Tensor of shape (O, I/g, h, w), or (O, 1, h, w) for a diagonal branch.
        kernel_shape: Shape (O, I/g, k_h, k_w) of the whole kernel.
        diagonal: Place the operator on the (group-wise) channel diagonal.

    Returns:
        Tensor of shape `kernel_shape`, zero outside of the branch's support.
    """
    out_channels, group_channels, height, width = kernel_shape
    if diagonal:
        rows = torch.arange(out_channels, device=operator.device)
        full = operator.new_zeros((out_channels, group_channels, *operator.shape[2:]))
        full[rows, rows % group_channels] = operator[:, 0]
        operator = full
    pad_height = (height - operator.shape[2]) // 2
    pad_width = (width - operator.shape[3]) // 2
    return F.pad(operator, (pad_width, pad_width, pad_height, pad_height))


def merge(
    branches: Sequence[Branch],
    operators: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    kernel_shape: Sequence[int],
) -> Tensor:
    """Merges the branches into one kernel: `W' = sum_b s_b * A_b theta_b`.

    Args:
        branches: The branches to add up.
        operators: Branch name to operator.
        scales: Branch name to scale of shape (O,); entries of unscaled branches are not looked at.
        kernel_shape: Shape (O, I/g, k_h, k_w) of the whole kernel.

    Returns:
        Kernel of shape `kernel_shape` and the operators' dtype.
    """
    dtype = operators[branches[0].name].dtype
    exact = torch.promote_types(dtype, torch.float32)
    parts = []
    for branch in branches:
        operator = operators[branch.name].to(exact)
        if branch.scaled:
            operator = operator * scales[branch.name].to(operator.device, exact).view(-1, 1, 1, 1)
        parts.append(embed(operator, kernel_shape, branch.diagonal))
    return sum(parts[1:], parts[0]).to(dtype)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _check_centred(name: str, conv: nn.Conv2d) -> None:
    centred = [dilation * (size - 1) // 2 for dilation, size in zip(_pair(conv.dilation), _pair(conv.kernel_size))]
    if isinstance(conv.padding, str):
        padding = centred if conv.padding == 'same' else [0, 0]
    else:
        padding = list(_pair(conv.padding))
    if any(size % 2 == 0 for size in _pair(conv.kernel_size)) or padding != centred:
        raise ValueError(
            f'A {name} branch can only be embedded in an odd kernel with padding dilation * (kernel_size - 1) / 2, '
            f'but the convolution has kernel_size={tuple(conv.kernel_size)}, dilation={tuple(conv.dilation)} and '
            f'padding={conv.padding}.'
        )
