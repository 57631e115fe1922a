"""RepGhostNet (arXiv 2211.06088) in timm's repghost."""

from typing import Any

from torch import nn

from .branch_sum import BranchSum, MakePlain, Part, Reader, normalized

__all__ = ['READERS']


def _repghost_module(block: Any, plain: MakePlain) -> nn.Module:
    """Its depthwise convolution has branches; the pointwise one before it is plain already."""
    identities = (Part(norm=norm) for norm in block.fusion_bn)
    block.cheap_operation = plain(BranchSum((normalized(block.cheap_operation, '0', '1'), *identities)))
    block.fusion_conv, block.fusion_bn = nn.Sequential(), nn.Sequential()
    return block


READERS: dict[str, Reader] = {'RepGhostModule': _repghost_module}
