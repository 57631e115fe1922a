"""Small blocks of each family, as a training leaves them."""

from typing import NamedTuple

import torch
from timm.layers import SqueezeExcite
from timm.models import byobnet, fastvit, ghostnet, repghost, repvit
from torch import nn

try:
    from timm.models import lcnetv2
except ImportError:
    lcnetv2 = None

ALL_OF_A_BLOCK = {'1x1': 1, 'identity': 1, 'kxk': 1}


class Example(NamedTuple):
    """A block, number of its input channels, and the branches of the convolutions that take its place."""

    block: nn.Module
    channels: int
    branches: dict[str, dict[str, int]]


def examples() -> dict[str, Example]:
    """Name of an example to the example, as trained, in float64."""
    torch.manual_seed(0)
    attention = byobnet.LayerFn(attn=SqueezeExcite)
    repvgg, mobile, ghost = byobnet.RepVggBlock, byobnet.MobileOneBlock, ghostnet.GhostBottleneckV3(4, 6, 4, stride=2)
    fast = fastvit.MobileOneBlock(8, 8, 3, group_size=1, num_conv_branches=2, use_se=True)
    large = fastvit.ReparamLargeKernelConv(4, 8, 7, 2, group_size=1, small_kernel=3, use_se=True, act_layer=nn.GELU)
    thrice = {**ALL_OF_A_BLOCK, 'kxk': 3}
    of_ghost = {f'ghost{each}.primary_conv.conv': {'kxk': 3} for each in (1, 2)}
    of_ghost |= {f'ghost{each}.cheap_operation.conv': thrice for each in (1, 2)}
    found = {
        'repvgg': Example(repvgg(8, 8, group_size=4), 8, {'conv': ALL_OF_A_BLOCK}),
        'repvgg-attention': Example(repvgg(4, 8, stride=2, layers=attention), 4, {'conv': {'1x1': 1, 'kxk': 1}}),
        'mobileone-depthwise': Example(mobile(8, 8, group_size=1, num_conv_branches=3), 8, {'conv': thrice}),
        'mobileone-pointwise': Example(
            mobile(4, 8, kernel_size=1, num_conv_branches=2, layers=attention), 4, {'conv': {'kxk': 2}}
        ),
        'fastvit-mobileone': Example(fast, 8, {'conv': {**ALL_OF_A_BLOCK, 'kxk': 2}}),
        'fastvit-large': Example(large, 4, {'conv': {'3x3': 1, 'kxk': 1}}),
        'repvit': Example(repvit.RepVggDw(6, 3), 6, {'conv': ALL_OF_A_BLOCK}),
        'repvit-legacy': Example(repvit.RepVggDw(6, 3, legacy=True), 6, {'conv': ALL_OF_A_BLOCK}),
        'repghost': Example(repghost.RepGhostModule(4, 6), 4, {'cheap_operation.conv': {'identity': 1, 'kxk': 1}}),
        'ghostnetv3': Example(ghost, 4, {'conv_dw.conv': {'1x1': 1, 'kxk': 3}, **of_ghost}),
    }
    if lcnetv2 is not None:
        block = lcnetv2.RepDepthwiseSeparable(4, 6, 1, dw_kernel_size=5, use_rep=True, use_se=True)
        found['lcnetv2'] = Example(block, 4, {'dw_conv.conv': {'1x1': 1, '3x3': 1, 'kxk': 1}})
    for example in found.values():
        randomized(example.block).double().train()
    return found


def randomized(model: nn.Module) -> nn.Module:
    """As a training leaves it: no BatchNorm is neutral."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def images(channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.randn(4, channels, size, size, dtype=torch.float64) + 0.3
