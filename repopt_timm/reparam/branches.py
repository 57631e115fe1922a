"""The branch algebra of a CSLA convolution, `y = sum_b s_b * conv(x; A_b theta_b)` (section 3.1, arXiv 2205.15242)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ['Branch', 'branch_names', 'embed', 'merge', 'merge_backward']

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


def support(kernel: Tensor, branch: Branch) -> Tensor:
    """Returns the view of a kernel's entries that a branch reaches.

    Args:
        kernel: Kernel of shape (O, I/g, k_h, k_w), or a tensor of that shape such as its gradient.
        branch: The branch.

    Returns:
        View of shape (O, I/g, h, w); of a diagonal branch (g, O/g, h, w).
    """
    tops = [(outer - inner) // 2 for outer, inner in zip(kernel.shape[2:], branch.kernel_size)]
    height, width = (slice(top, top + size) for top, size in zip(tops, branch.kernel_size))
    window = kernel[:, :, height, width]
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
        operators: Branch name to operator.
        scales: Branch name to scale of shape (O,); entries of unscaled branches are not looked at.
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
        grad_kernel: Gradient of the kernel, in float32 or better; overwritten.

    Returns:
        Branch name to gradient of its operator, in the operator's shape and `grad_kernel`'s dtype, and branch name to
        gradient of its scale.
    """
    exact = grad_kernel.dtype
    grad_operators, grad_scales = {}, {}
    # The largest last: its gradient takes the kernel's place.
    for branch in sorted(branches, key=lambda branch: branch.name == 'kxk'):
        operator = operators[branch.name]
        part = support(grad_kernel, branch)
        if branch.scaled:
            scale = scales[branch.name].to(part.device, exact).view(-1, 1, 1, 1)
            grad_scales[branch.name] = torch.einsum('oihw,oihw->o', part, operator.to(exact))
            part = part.mul_(scale) if branch.name == 'kxk' else part * scale
        else:
            part = part.clone()
        grad_operators[branch.name] = part.reshape(operator.shape)
    return grad_operators, grad_scales


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
