"""FastViT (arXiv 2303.14189) and MobileCLIP's image encoders in timm's fastvit."""

from typing import Any

from torch import nn

from .branch_sum import BranchSum, MakePlain, Part, Reader, normalized

__all__ = ['KEPT', 'READERS']


def _mobileone(block: Any, plain: MakePlain) -> nn.Module:
    parts = [normalized(each) for each in block.conv_kxk or ()]
    if block.conv_scale is not None:
        parts.append(normalized(block.conv_scale))
    if block.identity is not None:
        parts.append(Part(norm=block.identity))
    return plain(BranchSum(tuple(parts)), se=block.se, act=block.act)


def _large_kernel(block: Any, plain: MakePlain) -> nn.Module:
    parts = [normalized(block.large_conv)]
    if getattr(block, 'small_conv', None) is not None:
        parts.append(normalized(block.small_conv))
    return plain(BranchSum(tuple(parts)), se=block.se, act=block.act)


READERS: dict[str, Reader] = {'MobileOneBlock': _mobileone, 'ReparamLargeKernelConv': _large_kernel}

KEPT = {
    'RepMixer': 'a residual connection around the difference of two normalized sums, not one sum',
    'RepConditionalPosEnc': 'a residual connection around a convolution, not a sum that is normalized',
}
