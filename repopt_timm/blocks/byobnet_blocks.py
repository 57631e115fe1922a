"""RepVGG (arXiv 2101.03697) and MobileOne (arXiv 2206.04040) in timm's byobnet."""

from typing import Any

from torch import nn

from ..reparam import stage_scale
from .branch_sum import BranchSum, MakePlain, Part, Reader, normalized

__all__ = ['READERS', 'check_drop_path']


def _repvgg(block: Any, plain: MakePlain) -> nn.Module:
    check_drop_path(block)
    parts = [normalized(block.conv_kxk), normalized(block.conv_1x1)]
    if block.identity is not None:
        parts.append(Part(norm=block.identity))
    return plain(BranchSum(tuple(parts), initial=_by_index_in_stage), attn=block.attn, act=block.act)


def _by_index_in_stage(network: nn.Module, conv: str) -> float:
    index = conv.split('.')[-2:-1]
    return stage_scale(int(index[0]) if index and index[0].isdigit() else 0)


def _mobileone(block: Any, plain: MakePlain) -> nn.Module:
    check_drop_path(block)
    parts = [normalized(each) for each in block.conv_kxk]
    if block.conv_scale is not None:
        parts.append(normalized(block.conv_scale))
    if block.identity is not None:
        parts.append(Part(norm=block.identity))
    return plain(BranchSum(tuple(parts)), attn=block.attn, act=block.act)


def check_drop_path(block: Any) -> None:
    """Raises a ValueError if a block drops branches at random."""
    if rate := getattr(block.drop_path, 'drop_prob', 0):
        raise ValueError(f'it drops branches at a rate of {rate:.3g}; create the model with drop_path_rate=0')


READERS: dict[str, Reader] = {'RepVggBlock': _repvgg, 'MobileOneBlock': _mobileone}
