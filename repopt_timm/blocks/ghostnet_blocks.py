"""GhostNetV3 (arXiv 2404.11202) in timm's ghostnet. Both classes have a plain form of their own, `infer_mode`."""

from typing import Any

from torch import nn

from .branch_sum import BranchSum, MakePlain, Part, Reader, normalized

__all__ = ['READERS']


def _module_v3(block: Any, plain: MakePlain) -> nn.Module:
    block.primary_conv = plain(_sum(block, 'primary'), act=block.primary_activation)
    block.cheap_operation = plain(_sum(block, 'cheap'), act=block.cheap_activation)
    # The other form does not run any more, but TorchScript compiles it.
    block.primary_rpr_conv = nn.ModuleList([nn.Identity()])
    block.cheap_rpr_conv = nn.ModuleList()
    for name in ('primary_activation', 'cheap_activation', 'cheap_rpr_scale', 'cheap_rpr_skip'):
        setattr(block, name, nn.Identity())
    block.infer_mode = True
    return block


def _bottleneck_v3(block: Any, plain: MakePlain) -> nn.Module:
    """Its depthwise convolution has branches if it is strided; otherwise it has none."""
    if block.stride > 1:
        block.conv_dw = plain(_sum(block, 'dw'))
    block.dw_rpr_conv, block.dw_rpr_scale = nn.ModuleList(), nn.Identity()
    block.infer_mode = True
    return block


def _sum(block: Any, which: str) -> BranchSum:
    parts = [normalized(each, norm='bn1') for each in getattr(block, f'{which}_rpr_conv')]
    if (scale := getattr(block, f'{which}_rpr_scale')) is not None:
        parts.append(normalized(scale, norm='bn1'))
    if (skip := getattr(block, f'{which}_rpr_skip')) is not None:
        parts.append(Part(norm=skip))
    return BranchSum(tuple(parts))


READERS: dict[str, Reader] = {'GhostBottleneckV3': _bottleneck_v3, 'GhostModuleV3': _module_v3}
