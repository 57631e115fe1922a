"""The weights of trained branches as those of one convolution and one BatchNorm, and the scales that they imply."""

import torch
from torch import Tensor, nn

from ..reparam import Branch, embed
from .readers import BranchSum, Part

__all__ = ['implied_vectors', 'load_merged_', 'scale_of']


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
        return like.new_ones(len(like), dtype=torch.float64)
    assert norm.running_var is not None
    sigma = (norm.running_var.double() + norm.eps).sqrt()
    return sigma.reciprocal() if norm.weight is None else norm.weight.double() / sigma


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
        norm: BatchNorm to fill; that of the sum if it has one.
    """
    kernel = torch.zeros_like(conv.weight, dtype=torch.float64)
    mean, offset, variance = kernel.new_zeros(3, len(kernel))
    for part in source.parts:
        scale = scale_of(part, kernel)
        operator, bias = scale.view(-1, 1, 1, 1), torch.zeros_like(scale)
        if part.conv is not None:
            operator = operator * part.conv.weight.double()
            bias = bias if part.conv.bias is None else part.conv.bias.double()
        kernel += embed(operator, kernel.shape, Branch.of(source.name_of(part), conv.kernel_size))
        gamma = None if part.norm is None else part.norm.weight
        variance += 1.0 if gamma is None else gamma.double() ** 2
        if part.norm is None:
            offset += bias
            continue
        branch_mean = scale * (part.norm.running_mean.double() - bias)  # type: ignore[union-attr]
        mean += branch_mean
        offset += (0.0 if part.norm.bias is None else part.norm.bias.double()) - branch_mean
    conv.weight.copy_(kernel)
    assert norm.running_mean is not None and norm.running_var is not None
    if source.norm is not None:
        norm.running_mean -= offset
        return
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
    norm.bias.copy_(offset + mean)


@torch.no_grad()
def implied_vectors(source: BranchSum) -> dict[str, Tensor]:
    """Returns branch name to the scale that trained branches imply; equal ones share the root of their mean square."""
    vectors = {}
    for branch, count in source.counts.items():
        equal = [scale_of(part, source.kxk.weight) for part in source.parts if source.name_of(part) == branch]
        vectors[branch] = equal[0] if count == 1 else torch.stack(equal).square().mean(0).sqrt()
    return vectors
