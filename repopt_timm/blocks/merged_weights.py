"""The weights of a trained multi-branch block as those of one convolution and one BatchNorm."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..reparam import Branch, embed
from .branch_sum import BranchSum, Part

__all__ = ['load_merged_', 'scale_of']


class _Affine(NamedTuple):
    """A branch in evaluation mode: `scale * conv(x) + offset`, and the mean of `scale * conv(x)`; shape (O,)."""

    scale: Tensor
    offset: Tensor
    mean: Tensor


def scale_of(part: Part, like: Tensor) -> Tensor:
    """Returns what a branch multiplies its operator with, gamma / sigma, or ones without a BatchNorm.

    Args:
        part: The branch.
        like: Kernel of shape (O, I/g, k_h, k_w), for number of channels and device.

    Returns:
        Vector of shape (O,), float64.
    """
    norm = part.norm
    if norm is None:
        return like.new_ones(like.shape[0], dtype=torch.float64)
    assert norm.running_var is not None
    sigma = (norm.running_var.double() + norm.eps).sqrt()
    return sigma.reciprocal() if norm.weight is None else norm.weight.double() / sigma


def _affine(part: Part, like: Tensor) -> _Affine:
    scale = scale_of(part, like)
    bias = torch.zeros_like(scale)
    if part.conv is not None and part.conv.bias is not None:
        bias = part.conv.bias.double()
    if part.norm is None:
        return _Affine(scale, bias, torch.zeros_like(scale))
    assert part.norm.running_mean is not None
    mean = scale * (part.norm.running_mean.double() - bias)
    offset = -mean
    if part.norm.bias is not None:
        offset = offset + part.norm.bias.double()
    return _Affine(scale, offset, mean)


@torch.no_grad()
def load_merged_(source: BranchSum, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Fills convolution and BatchNorm so that both compute in evaluation mode what the branches do.

    The kernel is `W' = sum_b gamma_b / sigma_b * A_b theta_b`. A BatchNorm that followed the sum keeps gamma, beta and
    variance, and its mean moves by the branches' offsets. One that is added gets the branches' mean
    `sum_b gamma_b / sigma_b * mu_b`, which is exact, and `sum_b gamma_b^2` for its variance, as if branches did not
    correlate: gamma undoes it, so that the function stays, and `recalibrate` replaces it.

    Args:
        source: The trained branches.
        conv: Convolution to fill.
        norm: BatchNorm to fill.
    """
    affines = [_affine(part, conv.weight) for part in source.parts]
    conv.weight.copy_(_merged_kernel(source, conv.weight))
    offset = torch.stack([affine.offset for affine in affines]).sum(0)
    assert norm.running_mean is not None and norm.running_var is not None
    if source.norm is not None:
        norm.load_state_dict(source.norm.state_dict())
        norm.running_mean.copy_(norm.running_mean.double() - offset)
        return
    mean = torch.stack([affine.mean for affine in affines]).sum(0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(torch.stack([_output_variance(part, conv.weight) for part in source.parts]).sum(0))
    norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
    norm.bias.copy_(offset + mean)


def _merged_kernel(source: BranchSum, like: Tensor) -> Tensor:
    height, width = like.shape[2:]
    kernel = torch.zeros_like(like, dtype=torch.float64)
    for part in source.parts:
        operator = scale_of(part, like).view(-1, 1, 1, 1)
        if part.conv is not None:
            operator = operator * part.conv.weight.double()
        kernel += embed(operator, like.shape, Branch.of(source.name_of(part), (height, width)))
    return kernel


def _output_variance(part: Part, like: Tensor) -> Tensor:
    weight = None if part.norm is None else part.norm.weight
    return torch.ones(len(like), dtype=torch.float64, device=like.device) if weight is None else weight.double() ** 2
