"""The CSLA convolution, and its Hyper-Search twin whose scales are trained (section 3.2 of arXiv 2205.15242)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .branches import Branch, branch_names, merge, merge_backward
from .vectors import check_vectors

__all__ = ['CSLAConv2d']


class _MergedConv2d(torch.autograd.Function):
    """A convolution with a merged kernel, which the backward pass merges again instead of keeping it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        branches: Sequence[Branch],
        shape: Sequence[int],
        geometry: Sequence[Any],
        *tensors: Tensor,
    ) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ctx.save_for_backward(x, *tensors)
        ctx.branches, ctx.shape, ctx.geometry = branches, shape, geometry
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.conv2d(x, merge(branches, *_by_name(branches, tensors), shape), bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        operators, scales = _by_name(ctx.branches, tensors)
        stride, padding, dilation, groups = ctx.geometry
        needed = [ctx.needs_input_grad[0], True, ctx.bias_dtype is not None]
        kernel = merge(ctx.branches, operators, scales, ctx.shape).to(x.dtype)
        grad_x, grad_kernel, grad_bias = torch.ops.aten.convolution_backward(
            grad, x, kernel, [ctx.shape[0]], stride, padding, dilation, False, [0, 0], groups, needed
        )
        exact = torch.promote_types(tensors[0].dtype, torch.float32)
        grad_operators, grad_scales = merge_backward(ctx.branches, operators, scales, grad_kernel.to(exact))
        grads = [grad_operators[branch.name] for branch in ctx.branches]
        grads += [grad_scales[branch.name] for branch in ctx.branches if branch.scaled]
        grads = [part.to(tensor.dtype) for part, tensor in zip(grads, tensors)]
        grad_bias = None if grad_bias is None else grad_bias.to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None, *grads


def _by_name(branches: Sequence[Branch], tensors: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    scaled = [branch for branch in branches if branch.scaled]
    operators = {branch.name: tensor for branch, tensor in zip(branches, tensors)}
    return operators, {branch.name: tensor for branch, tensor in zip(scaled, tensors[len(branches) :])}


class CSLAConv2d(nn.Module):
    """A convolution that trains several scaled linear branches and runs them as one merged kernel.

    Adding up the kernels before one convolution gives the same function and the same gradients as adding up the
    branches' outputs, without their activations. The scales are buffers, or parameters in a Hyper-Search; the buffers
    stay float32 whatever dtype the module is cast to.

    Args:
        conv: Gives shape, stride, padding, dilation, groups and bias; its weight is not looked at, it may be on `meta`.
        names: The branches; those of a RepOpt-VGG block when left out.
        scale: Initial value of the scales.
        trainable_scales: Make the scales parameters (Hyper-Search) instead of buffers (CSLA).
        device: Device of the parameters.
        dtype: Floating point type of the parameters.

    Raises:
        ValueError: If `conv` cannot have one of the branches.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        names: Sequence[str] | None = None,
        scale: float = 1.0,
        trainable_scales: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if conv.padding_mode != 'zeros':
            raise ValueError(f"A CSLA convolution pads with zeros, not with padding_mode='{conv.padding_mode}'.")
        self.in_channels = conv.in_channels
        self.out_channels = conv.out_channels
        self.kernel_size: Any = conv.kernel_size
        self.stride: Any = conv.stride
        self.padding: Any = conv.padding
        self.dilation: Any = conv.dilation
        self.groups = conv.groups
        self.scale = scale
        self.trainable_scales = trainable_scales
        if conv.bias is None:
            self.register_parameter('bias', None)
        else:
            self.bias = nn.Parameter(torch.zeros(conv.out_channels, device=device, dtype=dtype))

        names = names or branch_names(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)
        self._branches = tuple(Branch.of(name, conv) for name in names)
        self.branches = nn.ModuleDict()
        for branch in self._branches:
            operator = branch.operator(conv, device=device, dtype=dtype)
            if branch.scaled and trainable_scales:
                vector = torch.full((conv.out_channels,), scale, device=device, dtype=dtype)
                operator.register_parameter('scale', nn.Parameter(vector))
            elif branch.scaled:
                vector = torch.full((conv.out_channels,), scale, device=device, dtype=torch.float32)
                operator.register_buffer('scale', vector)
            self.branches[branch.name] = operator

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gives operators PyTorch's default initialization, the identity ones, and scales their initial value."""
        for branch, operator in self._operators():
            if branch.scaled:
                operator.reset_parameters()
                operator.scale.fill_(self.scale)
            else:
                nn.init.ones_(operator.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _operators(self) -> list[tuple[Branch, Any]]:
        return list(zip(self._branches, self.branches.values()))

    def vectors(self) -> dict[str, Tensor]:
        """Returns branch name to scale of shape (O,); an unscaled branch's entry is what its operator has learned."""
        return {
            branch.name: (operator.scale if branch.scaled else operator.weight.flatten()).detach()
            for branch, operator in self._operators()
        }

    @torch.no_grad()
    def set_vectors(self, vectors: Mapping[str, Tensor], module: str = '') -> None:
        """Takes scales over; an unscaled branch's entry becomes its operator's initial value.

        Args:
            vectors: Branch name to vector of shape (O,), for exactly the branches of this convolution.
            module: Name of this module, for the error.

        Raises:
            ValueError: If a branch is missing or left over, or a vector does not fit.
        """
        check_vectors(module, vectors, self.out_channels, expected=self.branches.keys())
        for branch, operator in self._operators():
            if branch.scaled:
                operator.scale.copy_(vectors[branch.name])
            else:
                operator.weight.copy_(vectors[branch.name].view(-1, 1, 1, 1))

    def kernel(self) -> Tensor:
        """Returns the merged kernel of shape (O, I/g, k_h, k_w), differentiable in operators and scales."""
        return merge(self._branches, *_by_name(self._branches, self._tensors()), self._shape)

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def _tensors(self) -> list[Tensor]:
        operators = [operator.weight for _, operator in self._operators()]
        return operators + [operator.scale for branch, operator in self._operators() if branch.scaled]

    def to_conv(self) -> nn.Conv2d:
        """Returns the plain convolution with the merged kernel; same device, dtype and mode."""
        kernel = self.kernel().detach()
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias is not None,
            device='meta',
        )
        conv.weight = nn.Parameter(kernel)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone())
        return conv.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        # A compiler finds out by itself what to keep; a padding with a name is not one of the backward function's.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or isinstance(self.padding, str):
            return F.conv2d(x, self.kernel(), self.bias, *geometry)
        return _MergedConv2d.apply(x, self.bias, self._branches, self._shape, geometry, *self._tensors())

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, '
            f'trainable_scales={self.trainable_scales}'
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'CSLAConv2d':
        constant = [operator for _, operator in self._operators() if 'scale' in operator._buffers]
        exact = [operator.scale for operator in constant]
        super()._apply(fn, recurse)
        for operator, scale in zip(constant, exact):
            # A cast would round the constants; leaving `meta` has no values to keep.
            operator.scale = operator.scale.float() if scale.is_meta else scale.to(operator.scale.device)
        return self
