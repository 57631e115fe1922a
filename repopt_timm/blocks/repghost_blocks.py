"""RepGhostNet (arXiv 2211.06088) in timm's repghost."""

from typing import Any

from timm.models.repghost import RepGhostBottleneck
from torch import nn

from ..reparam import run_scale
from .branch_sum import BranchSum, MakePlain, Part, Reader, normalized

__all__ = ['READERS']


def _repghost_module(block: Any, plain: MakePlain) -> nn.Module:
    """Its depthwise convolution has branches; the pointwise one before it is plain already."""
    identities = (Part(norm=norm) for norm in block.fusion_bn)
    parts = (normalized(block.cheap_operation, '0', '1'), *identities)
    block.cheap_operation = plain(BranchSum(parts, initial=_by_bottleneck))
    block.fusion_conv, block.fusion_bn = nn.Sequential(), nn.Sequential()
    return block


def _by_bottleneck(network: nn.Module, conv: str) -> float:
    """Counts two modules for each bottleneck of a run of equal channels and stride 1.

    Published for RepOptGhostNet: github.com/DingXiaoH/RepOptimizers, repoptimizer/repoptghostnet_model.py.
    """
    bottleneck, _, module = conv.removesuffix('.cheap_operation.conv').rpartition('.')
    position = 0
    for name, each in network.named_modules():
        if isinstance(each, RepGhostBottleneck):
            position = 1 if len(each.shortcut) else position + 1
            if name == bottleneck:
                break
    return run_scale(2 * position - (module == 'ghost1') if position else 1)


READERS: dict[str, Reader] = {'RepGhostModule': _repghost_module}
