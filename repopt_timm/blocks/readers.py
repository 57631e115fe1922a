"""timm's multi-branch blocks, each read as a sum of branches: a convolution and a BatchNorm can take its place.

A reader for each class of block is in `READERS`; a new family needs one function and one line there.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.models.repghost import RepGhostBottleneck
from torch import nn

from ..reparam import refusal, run_scale, stage_scale


class Part(NamedTuple):
    """One branch of a block: its convolution, None for an identity, and the BatchNorm of this branch alone, if any."""

    conv: nn.Conv2d | None = None
    norm: nn.BatchNorm2d | None = None

    @classmethod
    def of(cls, module: Any) -> 'Part':
        """Reads a module whose children are a convolution, its BatchNorm, and otherwise nn.Identity."""
        conv, norm, *rest = module.children()
        if any(not isinstance(each, nn.Identity) for each in rest):
            raise ValueError(f'{type(module).__name__} does more than a convolution and a BatchNorm')
        return cls(conv, norm)


@dataclass(frozen=True)
class BranchSum:
    """`norm(sum_b norm_b(conv_b(x)))`: all that a plain convolution and one BatchNorm need to know.

    Parts with the largest kernel come first. `initial` gives the start of the scales, from the plain network and the
    convolution's name in it, where a family has a rule other than `run_scale`.
    """

    parts: tuple[Part, ...]
    norm: nn.BatchNorm2d | None = None
    initial: Callable[[nn.Module, str], float] | None = None

    def __post_init__(self) -> None:
        for conv, norm in (*self.parts, Part(norm=self.norm)):
            if conv is not None and (reason := refusal(conv)):
                raise ValueError(reason)
            if norm is not None and (not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None):
                raise ValueError(f'{type(norm).__name__} of a branch is not a BatchNorm2d with running statistics')
            if norm is not None and any(not isinstance(each, nn.Identity) for each in norm.children()):
                raise ValueError(f'{type(norm).__name__} of a branch drops or activates; set drop_block_rate=0')

    @property
    def kxk(self) -> Any:
        """The first convolution with the largest kernel."""
        return self.parts[0].conv

    @property
    def names(self) -> list[str]:
        """Name of each part's branch; parts of one name are equal branches that share a scale."""
        names = {None: 'identity', self.kxk.kernel_size: 'kxk'}
        sizes: list[Any] = [conv and conv.kernel_size for conv, _ in self.parts]
        return [names.get(size) or 'x'.join(map(str, size)) for size in sizes]

    @property
    def counts(self) -> dict[str, int]:
        """Branch name to the number of equal branches."""
        return {name: self.names.count(name) for name in sorted(self.names)}


MakePlain = Callable[..., nn.Module]
"""Makes the plain block of a `BranchSum`; modules that follow its BatchNorm go by name: `plain(sum, act=nn.ReLU())`."""


def _sum(branches: Iterable[nn.Module | None], identity: Any, initial: Any = None) -> BranchSum:
    """Reads branches and the BatchNorm of an identity; None stands for what the block does not have."""
    parts = [Part.of(branch) for branch in branches if branch is not None]
    if identity is not None:
        parts.append(Part(norm=identity))
    return BranchSum(tuple(parts), initial=initial)


def _repvgg(block: Any, plain: MakePlain) -> nn.Module:
    """RepVGG, arXiv 2101.03697."""
    _check_drop_path(block)
    branches = _sum([block.conv_kxk, block.conv_1x1], block.identity, _by_index_in_stage)
    return plain(branches, attn=block.attn, act=block.act)


def _by_index_in_stage(network: nn.Module, conv: str) -> float:
    index = f'.{conv}'.split('.')[-2]
    return stage_scale(int(index) if index.isdigit() else 0)


def _mobileone(block: Any, plain: MakePlain) -> nn.Module:
    """MobileOne, arXiv 2206.04040, in byobnet and in fastvit, which calls the attention `se`."""
    _check_drop_path(block)
    attention = {name: getattr(block, name) for name in ('attn', 'se') if hasattr(block, name)}
    return plain(_sum([*(block.conv_kxk or ()), block.conv_scale], block.identity), **attention, act=block.act)


def _check_drop_path(block: Any) -> None:
    if rate := getattr(getattr(block, 'drop_path', None), 'drop_prob', 0):
        raise ValueError(f'it drops branches at a rate of {rate:.3g}; create the model with drop_path_rate=0')


def _fastvit_large_kernel(block: Any, plain: MakePlain) -> nn.Module:
    """FastViT, arXiv 2303.14189."""
    return plain(_sum([block.large_conv, getattr(block, 'small_conv', None)], None), se=block.se, act=block.act)


def _ghost_module_v3(block: Any, plain: MakePlain) -> nn.Module:
    """GhostNetV3, arXiv 2404.11202. Block and bottleneck have a plain form of their own, `infer_mode`."""
    block.primary_conv = plain(_ghost_sum(block, 'primary'), act=block.primary_activation)
    block.cheap_operation = plain(_ghost_sum(block, 'cheap'), act=block.cheap_activation)
    # The other form does not run any more, but TorchScript compiles it.
    block.primary_rpr_conv, block.cheap_rpr_conv = nn.ModuleList([nn.Identity()]), nn.ModuleList()
    for name in ('primary_activation', 'cheap_activation', 'cheap_rpr_scale', 'cheap_rpr_skip'):
        setattr(block, name, nn.Identity())
    block.infer_mode = True
    return block


def _ghost_bottleneck_v3(block: Any, plain: MakePlain) -> nn.Module:
    """GhostNetV3's bottleneck: a strided one has a depthwise convolution, with branches."""
    if block.stride > 1:
        block.conv_dw = plain(_ghost_sum(block, 'dw'))
    block.dw_rpr_conv, block.dw_rpr_scale = nn.ModuleList(), nn.Identity()
    block.infer_mode = True
    return block


def _ghost_sum(block: Any, which: str) -> BranchSum:
    convs, scale, skip = (getattr(block, f'{which}_rpr_{each}') for each in ('conv', 'scale', 'skip'))
    return _sum([*convs, scale], skip)


def _lcnetv2(block: Any, plain: MakePlain) -> nn.Module:
    """PP-LCNetV2: the depthwise convolution has branches of 5x5, 3x3 and 1x1, and never an identity."""
    block.dw_conv, block.dw_conv_list = plain(_sum(block.dw_conv_list, None)), None
    return block


def _repghost_module(block: Any, plain: MakePlain) -> nn.Module:
    """RepGhostNet, arXiv 2211.06088: the depthwise convolution has branches, the pointwise one before it is plain."""
    identities = (Part(norm=norm) for norm in block.fusion_bn)
    block.cheap_operation = plain(BranchSum((Part.of(block.cheap_operation), *identities), initial=_by_bottleneck))
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


def _repvit(block: Any, plain: MakePlain) -> nn.Module:
    """RepViT, arXiv 2307.09283."""
    kxk = Part.of(block.conv)
    if not block.legacy:
        return plain(BranchSum((kxk, Part(block.conv1), Part()), norm=block.bn))
    pointwise = Part.of(block.conv1)
    return plain(BranchSum((kxk, pointwise, Part(norm=_bare_identity(pointwise)))))


@torch.no_grad()
def _bare_identity(pointwise: Any) -> nn.BatchNorm2d:
    """Returns a BatchNorm that leaves its input as it is, and knows its statistics.

    The bare input has no statistics of its own. Each channel's are those of the depthwise 1x1 convolution beside it,
    divided by its weight, unless that is so small that it says nothing about the input.
    """
    weight, norm = pointwise.conv.weight.flatten(), pointwise.norm
    known = weight.abs() > 1e-3
    made: Any = nn.BatchNorm2d(len(weight), norm.eps, device=weight.device, dtype=weight.dtype)
    made.running_mean.copy_(torch.where(known, norm.running_mean / weight, 0.0))
    made.running_var.copy_(torch.where(known, norm.running_var / weight.square(), 1.0))
    made.weight.copy_((made.running_var + made.eps).sqrt())
    made.bias.copy_(made.running_mean)
    return made


READERS: dict[str, Callable[[Any, MakePlain], nn.Module]] = {
    'timm.models.byobnet.MobileOneBlock': _mobileone,
    'timm.models.byobnet.RepVggBlock': _repvgg,
    'timm.models.fastvit.MobileOneBlock': _mobileone,
    'timm.models.fastvit.ReparamLargeKernelConv': _fastvit_large_kernel,
    'timm.models.ghostnet.GhostBottleneckV3': _ghost_bottleneck_v3,
    'timm.models.ghostnet.GhostModuleV3': _ghost_module_v3,
    'timm.models.lcnetv2.RepDepthwiseSeparable': _lcnetv2,
    'timm.models.repghost.RepGhostModule': _repghost_module,
    'timm.models.repvit.RepVggDw': _repvit,
}
"""Class of a block to its reader. It returns what takes its place: a plain block, or itself with plain ones inside."""

KEPT = {
    'timm.models.efficientvim.EfficientViMBlock',
    'timm.models.efficientvim.PatchMerging',
    'timm.models.fastvit.RepConditionalPosEnc',
    'timm.models.fastvit.RepMixer',
    'timm.models.iformer.RepCPE',
    'timm.models.shvit.Residual',
}
"""Classes of blocks that timm can merge for inference, and that keep their branches here.

A residual connection is not a branch of a CSLA block: its identity is not trained, and weight decay must not shrink it.
"""
