"""Small blocks of each family, trained for some steps so that no BatchNorm is neutral."""

from typing import NamedTuple

import timm.models.byobnet as byobnet
import torch
from timm.layers import SqueezeExcite
from torch import nn

Counts = dict[str, dict[str, int]]


class Example(NamedTuple):
    """A block, number of its input channels, and the branches of the convolutions that take its place."""

    block: nn.Module
    channels: int
    branches: Counts


def _byobnet() -> dict[str, Example]:
    attention = byobnet.LayerFn(attn=SqueezeExcite)
    mobile = byobnet.MobileOneBlock
    return {
        'RepVggBlock': Example(
            byobnet.RepVggBlock(8, 8, group_size=4), 8, {'conv': {'1x1': 1, 'identity': 1, 'kxk': 1}}
        ),
        'RepVggBlock-attention': Example(
            byobnet.RepVggBlock(4, 8, stride=2, layers=attention), 4, {'conv': {'1x1': 1, 'kxk': 1}}
        ),
        'MobileOneBlock-depthwise': Example(
            mobile(8, 8, group_size=1, num_conv_branches=3), 8, {'conv': {'1x1': 1, 'identity': 1, 'kxk': 3}}
        ),
        'MobileOneBlock-pointwise': Example(
            mobile(4, 8, kernel_size=1, num_conv_branches=2, layers=attention), 4, {'conv': {'kxk': 2}}
        ),
    }


def examples() -> dict[str, Example]:
    """Name of an example to the example, trained in float64."""
    torch.manual_seed(0)
    return {name: _trained(each) for name, each in _byobnet().items()}


def _trained(example: Example) -> Example:
    block = example.block.double().train()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.05)
    for _ in range(3):
        block(images(example.channels)).square().mean().backward()
        optimizer.step()
    return example


def images(channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.randn(4, channels, size, size, dtype=torch.float64) + 0.3
