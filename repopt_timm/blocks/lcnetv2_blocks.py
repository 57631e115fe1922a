"""PP-LCNetV2 in timm's lcnetv2."""

from typing import Any

from torch import nn

from .branch_sum import BranchSum, MakePlain, Reader, normalized

__all__ = ['READERS']


def _depthwise_separable(block: Any, plain: MakePlain) -> nn.Module:
    """Its depthwise convolution has branches of 5x5, 3x3 and 1x1, and never an identity."""
    block.dw_conv = plain(BranchSum(tuple(normalized(each) for each in block.dw_conv_list)))
    block.dw_conv_list = None
    return block


READERS: dict[str, Reader] = {'RepDepthwiseSeparable': _depthwise_separable}
