"""What takes the place of a multi-branch block: a convolution, a BatchNorm, and what followed them."""

from typing import Any

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..reparam import branches_of, drop_scales, merge_branches

__all__ = ['PlainBlock', 'fold']


class PlainBlock(nn.Sequential):
    """`conv`, `bn`, then attention and activation under the names that they had in the multi-branch block.

    Args:
        conv: The convolution.
        bn: The BatchNorm.
        adds_norm: Whether the multi-branch block had no BatchNorm after the sum of its branches. The statistics of one
            that was added are estimates after a merge; see `recalibrate`.
        after: Further modules by name, in the order in which they run.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, adds_norm: bool = True, **after: nn.Module):
        super().__init__()
        self.add_module('conv', conv)
        self.add_module('bn', bn)
        for name, module in after.items():
            self.add_module(name, module)
        self.adds_norm = adds_norm

    def reparameterize(self) -> None:
        """Merges branches of a twin and folds BatchNorm, for inference; `timm.utils.reparameterize_model` calls it."""
        fold(self)

    def fuse(self) -> 'PlainBlock':
        """Does the same for models that fuse themselves, and returns the block."""
        fold(self)
        return self


def fold(block: Any) -> None:
    """Folds `block.bn` into `block.conv`, in place, which drops its scales; branches are merged first."""
    if branches_of(block.conv):
        merge_branches(block.conv)
    conv, norm = block.conv, block.bn
    # Also those of a frozen or synchronized BatchNorm, which is of another class.
    mean, variance, eps = (getattr(norm, name, None) for name in ('running_mean', 'running_var', 'eps'))
    if mean is None or variance is None or eps is None:
        return
    # Their Grad Mult is of the kernel without the normalization.
    drop_scales(conv)
    conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, mean, variance, eps, norm.weight, norm.bias)
    block.bn = getattr(norm, 'act', nn.Identity())
