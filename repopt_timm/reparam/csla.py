"""The CSLA convolution, and its Hyper-Search twin whose scales are trained (section 3.2 of arXiv 2205.15242)."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .branches import Branch, BranchCounts, make_branches, merge, merge_backward
from .convolutions import pair, refusal
from .shards import is_sharded, whole
from .vectors import check_vectors

__all__ = ['CSLAConv2d']


class _MergedConv2d(torch.autograd.Function):
    """A convolution with a merged kernel, which the backward pass merges again instead of keeping it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        branches: Sequence[Branch],
        shape: Sequence[int],
        geometry: Sequence[Any],
        *tensors: Tensor,
    ) -> Tensor:
        return F.conv2d(x, merge(branches, *_by_name(branches, tensors), shape).to(x.dtype), bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, ctx.branches, ctx.shape, ctx.geometry, *tensors = inputs
        ctx.save_for_backward(x, *tensors)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
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
        return grad_x if needed[0] else None, grad_bias, None, None, None, *grads


def _by_name(branches: Sequence[Branch], tensors: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    scaled = [branch for branch in branches if branch.scaled]
    operators = {branch.name: tensor for branch, tensor in zip(branches, tensors)}
    return operators, {branch.name: tensor for branch, tensor in zip(scaled, tensors[len(branches) :])}


def _fake_quantized(conv: nn.Module) -> str | None:
    return 'its weight is fake-quantized, which branches would not be' if is_parametrized(conv) else None


class _Operator(nn.Module):
    """The trainable tensor of a branch, beside its scale."""

    def __init__(self, weight: Tensor, scale: Tensor | None, trainable_scale: bool):
        super().__init__()
        self.weight = nn.Parameter(weight)
        if scale is not None and trainable_scale:
            self.scale: Tensor = nn.Parameter(scale)
        elif scale is not None:
            self.register_buffer('scale', scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> '_Operator':
        return super()._apply(functools.partial(_apply_to_parts, fn), recurse)


def _apply_to_parts(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Applies a change of device, dtype or memory format, and to the operators of equal branches as to one tensor."""
    # channels_last is of four dimensions. A DTensor may be sharded so that it has no such view.
    if tensor.ndim < 5 or is_sharded(tensor):
        return fn(tensor)
    return fn(tensor.flatten(0, 1)).unflatten(0, tensor.shape[:2])


class CSLAConv2d(nn.Module):
    """A convolution that trains several scaled linear branches and runs them as one merged kernel.

    Adding up the kernels before one convolution gives the same function and the same gradients as adding up the
    branches' outputs, without their activations. The scales are buffers, or parameters in a Hyper-Search; the buffers
    stay float32 whatever dtype the module is cast to. Works under `torch.compile`, `torch.export`, `torch.jit.trace`,
    `torch.func.grad` and `vmap`, autocast, double backward and on `meta`; not under `torch.jit.script` and forward-mode
    differentiation (`torch.func.jvp`, `hessian`).

    Args:
        conv: Gives shape, stride, padding, dilation, groups, bias, device and dtype; its weight is not read.
        branches: Branch names, or {branch name: count}.
        scale: Initial value of the scales; None for constants that a checkpoint or `set_vectors` brings.
        trainable_scales: Make the scales parameters (Hyper-Search) instead of buffers (CSLA).

    Raises:
        ValueError: If `conv` is not a plain convolution, or cannot have one of the branches.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        branches: BranchCounts,
        scale: float | None = 1.0,
        trainable_scales: bool = False,
    ):
        super().__init__()
        if reason := refusal(conv) or _fake_quantized(conv):
            raise ValueError(f'{type(conv).__name__} cannot have branches: {reason}.')
        self.in_channels = conv.in_channels
        self.out_channels = conv.out_channels
        self.kernel_size: Any = conv.kernel_size
        self.stride = pair(conv.stride)
        self.padding: Any = conv.padding if isinstance(conv.padding, str) else pair(conv.padding)
        self.dilation = pair(conv.dilation)
        self.groups = conv.groups
        self.initial_scale = scale
        self.trainable_scales = trainable_scales
        self.has_scales = scale is not None
        if conv.bias is None:
            self.register_parameter('bias', None)
        else:
            self.bias = nn.Parameter(conv.bias.detach().clone(), conv.bias.requires_grad)

        self._branches = make_branches(branches, conv)
        self.branches = nn.ModuleDict()
        value = float('nan') if scale is None else scale
        dtype = conv.weight.dtype if trainable_scales else torch.float32
        for branch in self._branches:
            weight = conv.weight.new_empty(branch.operator_shape(self._shape))
            vector = conv.weight.new_full((conv.out_channels,), value, dtype=dtype) if branch.scaled else None
            if conv.weight.is_contiguous(memory_format=torch.channels_last) and weight.ndim == 4:
                weight = weight.contiguous(memory_format=torch.channels_last)
            operator = _Operator(branch.draw_(weight), vector, trainable_scales)
            operator.requires_grad_(conv.weight.requires_grad)
            self.branches[branch.name] = operator
        self.register_load_state_dict_post_hook(_note_scales)

    @property
    def branch_counts(self) -> dict[str, int]:
        """Branch name to number of equal branches."""
        return {branch.name: branch.count for branch in self._branches}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gives operators PyTorch's default initialization, identities ones, and scales their initial value.

        Scales that came from elsewhere stay as they are.
        """
        for branch, operator in self._operators():
            branch.draw_(operator.weight)
            if branch.scaled and self.initial_scale is not None:
                operator.scale.fill_(self.initial_scale)
        self.has_scales = self.has_scales or self.initial_scale is not None

    def _operators(self) -> list[tuple[Branch, Any]]:
        return list(zip(self._branches, self.branches.values()))

    def vectors(self) -> dict[str, Tensor]:
        """Returns branch name to scale of shape (O,); an identity's entry is what its operator has learned.

        Where `fully_shard` has sharded them, all processes have to call this.

        Raises:
            ValueError: If the module has no scales yet.
        """
        self._check_scales()
        return {
            branch.name: whole(operator.scale if branch.scaled else operator.weight).detach().flatten()
            for branch, operator in self._operators()
        }

    @torch.no_grad()
    def set_vectors(self, vectors: Mapping[str, Tensor], module: str = '') -> None:
        """Takes scales over; an identity's entry becomes its operator's initial value.

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
        self.has_scales = True

    def kernel(self) -> Tensor:
        """Returns the merged kernel of shape (O, I/g, k_h, k_w), differentiable in operators and scales.

        Raises:
            ValueError: If the module has no scales yet.
        """
        self._check_scales()
        return merge(self._branches, *_by_name(self._branches, self._tensors()), self._shape)

    def _check_scales(self) -> None:
        if not self.has_scales:
            raise ValueError(
                'This CSLA convolution has no scales yet. Create the model with scales=... (a file, '
                "'hf-hub:user/repo' or 'initial'), or load a checkpoint that holds them."
            )

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
        conv.weight = nn.Parameter(kernel, any(each.requires_grad for each in self._tensors()))
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return conv.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        self._check_scales()
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        # A compiler finds out by itself what to keep, and a trace cannot record a Function of ours.
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        # A padding with a name is not one of the backward function's.
        if traced or not torch.is_grad_enabled() or isinstance(self.padding, str) or x.ndim != 4:
            return F.conv2d(x, self.kernel(), self.bias, *geometry)
        device = x.device.type
        # Autocast leaves float64 as it is.
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        elif x.dtype != self._tensors()[0].dtype:
            # Raises as a plain convolution does.
            return F.conv2d(x, self.kernel(), self.bias, *geometry)
        return _MergedConv2d.apply(x, self.bias, self._branches, self._shape, geometry, *self._tensors())

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._check_scales()
        super()._save_to_state_dict(*args, **kwargs)

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
            if scale.is_meta and not operator.scale.is_meta:
                # Memory as it was found would pass for scales.
                operator.scale.fill_(float('nan'))
                self.has_scales = False
        return self


def _note_scales(module: nn.Module, incompatible_keys: Any) -> None:
    """Finds out whether the constants that a CSLA convolution started without were in what was loaded."""
    assert isinstance(module, CSLAConv2d)
    if not module.has_scales:
        scales = [operator.scale for branch, operator in module._operators() if branch.scaled]
        module.has_scales = all(not scale.is_meta and bool(scale.isfinite().all()) for scale in scales)
