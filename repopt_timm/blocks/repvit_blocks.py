"""RepViT (arXiv 2307.09283) in timm's repvit."""

from typing import Any

import torch
from torch import nn

from .branch_sum import BranchSum, MakePlain, Part, Reader, normalized

__all__ = ['READERS']

# A 1x1 weight below this says nothing about what goes into it.
_LEAST_WEIGHT = 1e-3


def _repvgg_dw(block: Any, plain: MakePlain) -> nn.Module:
    kxk = normalized(block.conv, 'c')
    if block.legacy:
        pointwise = normalized(block.conv1, 'c')
        return plain(BranchSum((kxk, pointwise, Part(norm=_identity_norm(pointwise)))))
    return plain(BranchSum((kxk, Part(block.conv1), Part()), norm=block.bn))


@torch.no_grad()
def _identity_norm(pointwise: Part) -> nn.BatchNorm2d:
    """Returns a BatchNorm that leaves its input as it is, and knows its statistics.

    The bare input has no statistics of its own. Each channel's are those of the depthwise 1x1 convolution beside it,
    divided by its weight.
    """
    conv: Any = pointwise.conv
    norm: Any = pointwise.norm
    made: Any = nn.BatchNorm2d(conv.out_channels, norm.eps, device=conv.weight.device, dtype=conv.weight.dtype)
    weight = conv.weight.flatten()
    known = weight.abs() > _LEAST_WEIGHT
    made.running_mean.copy_(torch.where(known, norm.running_mean / weight, 0.0))
    made.running_var.copy_(torch.where(known, norm.running_var / weight.square(), 1.0))
    made.weight.copy_((made.running_var + made.eps).sqrt())
    made.bias.copy_(made.running_mean)
    return made


READERS: dict[str, Reader] = {'RepVggDw': _repvgg_dw}
