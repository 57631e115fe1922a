"""The plain twin of a multi-branch network of timm: one convolution and one BatchNorm for each of its blocks."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..reparam import ConvPrior, keep_branches, multi_branch_blocks, resolve_prior
from . import (
    byobnet_blocks,
    fastvit_blocks,
    ghostnet_blocks,
    lcnetv2_blocks,
    repghost_blocks,
    repvit_blocks,
    residual_blocks,
)
from .branch_sum import BranchSum, MakePlain, Reader
from .merged_weights import load_merged_
from .plain_block import PlainBlock

__all__ = ['KEPT', 'READERS', 'BlockReport', 'Conversion', 'convert', 'plain_state_dict', 'plain_twin', 'report_twin']

_FAMILIES: dict[str, dict[str, Reader]] = {
    'byobnet': byobnet_blocks.READERS,
    'fastvit': fastvit_blocks.READERS,
    'ghostnet': ghostnet_blocks.READERS,
    'lcnetv2': lcnetv2_blocks.READERS,
    'repghost': repghost_blocks.READERS,
    'repvit': repvit_blocks.READERS,
}

READERS = {f'timm.models.{file}.{name}': reader for file, each in _FAMILIES.items() for name, reader in each.items()}
"""Class of a block that becomes plain, to what reads it."""

KEPT = {f'timm.models.fastvit.{name}': reason for name, reason in fastvit_blocks.KEPT.items()}
KEPT |= {f'timm.models.{name}': reason for name, reason in residual_blocks.KEPT.items()}
"""Class of a block that keeps its branches, to the reason."""


_HOOKS = (
    '_backward_hooks',
    '_backward_pre_hooks',
    '_forward_hooks',
    '_forward_hooks_always_called',
    '_forward_hooks_with_kwargs',
    '_forward_pre_hooks',
    '_forward_pre_hooks_with_kwargs',
    '_state_dict_hooks',
    '_state_dict_pre_hooks',
)


class BlockReport(NamedTuple):
    """What became of a multi-branch block.

    Attributes:
        name: Its name in the network.
        type: Its class.
        branches: Name of each convolution that took its place, to branch name to count; empty if it was left.
        reason: Why it was left as it is; empty if it was converted.
    """

    name: str
    type: str
    branches: dict[str, dict[str, int]]
    reason: str = ''


class Conversion(NamedTuple):
    """A plain twin, the description of the branches that each of its convolutions replaces, and the report."""

    twin: nn.Module
    sums: dict[str, BranchSum]
    report: list[BlockReport]


def plain_twin(model: nn.Module, weights: bool = False) -> nn.Module:
    """Makes the plain twin of a multi-branch network of timm: one convolution, one BatchNorm in each block's place.

    Attention and activations stay where they are. The convolutions carry the prior that the block's branches state, so
    that `Scales.initial`, `hyper_search` and `csla` know it. `report_twin` lists what is converted and what is left.

    Args:
        model: The network; any part of one will do. It is not changed.
        weights: Merge the trained branches into the twin, whose logits in evaluation mode are then those of the model.
            By default kernels are those of the first branch of full size, as timm initialized them, and added
            BatchNorms are neutral: a start for training from scratch.

    Returns:
        The plain network.

    Raises:
        ValueError: If the model has no multi-branch block, or one that cannot become plain, as one that drops its
            branches (`drop_path_rate`), or whose class is unknown.

    Example:
        >>> twin = plain_twin(timm.create_model('mobileone_s0'))
        >>> prepare(twin, Scales.initial(twin))
    """
    return convert(model, weights).twin


def report_twin(model: nn.Module) -> list[BlockReport]:
    """Lists what `plain_twin` makes of the multi-branch blocks of a model, in its order.

    Raises:
        ValueError: See `plain_twin`.
    """
    return convert(model).report


def plain_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Makes the state dict of the plain twin from one of the multi-branch network.

    Args:
        model: Multi-branch network whose parameters are those of `state_dict`; it is not changed.
        state_dict: Trained parameters.

    Raises:
        ValueError: See `plain_twin`.
    """
    trained = copy.deepcopy(model)
    trained.load_state_dict(state_dict, assign=True)
    return plain_twin(trained, weights=True).state_dict()


def convert(model: nn.Module, weights: bool = False) -> Conversion:
    """Makes the plain twin with all that is known about it; see `plain_twin`."""
    twin = copy.deepcopy(model)
    report: dict[str, BlockReport] = {}
    for name, block in multi_branch_blocks(twin):
        report[name] = BlockReport(name, type(block).__name__, {}, KEPT.get(_key(block), ''))
    if not report:
        raise ValueError(f'{type(model).__name__} has no multi-branch block: it is plain, or its branches are merged.')
    for name, each in report.items():
        if each.reason:
            keep_branches(twin.get_submodule(name))
    made: dict[nn.Module, tuple[str, BranchSum]] = {}
    converted: dict[nn.Module, nn.Module] = {}
    for name, block in multi_branch_blocks(twin):
        try:
            converted[block] = _reader(block)(block, _maker(name, block.training, weights, made))
        except ValueError as error:
            where = f"'{name}' of {type(model).__name__}" if name else 'The model'
            raise ValueError(f'{where} is a {type(block).__name__} that cannot become plain: {error}.') from None
    for old, new in converted.items():
        if new is not old:
            take_over_hooks(old, new)
    twin = replace_modules(twin, converted)
    sums = {}
    for conv_name, conv in twin.named_modules():
        if conv in made:
            block_name, sums[conv_name] = made[conv]
            report[block_name].branches[conv_name] = sums[conv_name].counts
    _carry_prior(twin, sums)
    return Conversion(twin, sums, [each for each in report.values() if each.branches or each.reason])


def _key(block: nn.Module) -> str:
    return f'{type(block).__module__}.{type(block).__qualname__}'


def _reader(block: nn.Module) -> Reader:
    if _key(block) not in READERS:
        raise ValueError('plain_twin does not know this class')
    return READERS[_key(block)]


def _maker(name: str, training: bool, weights: bool, made: dict[nn.Module, tuple[str, BranchSum]]) -> MakePlain:
    """Returns what makes the plain blocks of the block called `name`, and notes what they were made of."""

    def plain(source: BranchSum, **after: nn.Module) -> nn.Module:
        block = _plain_block(source, weights, after)
        made[block.conv] = (name, source)
        return block.train(training)

    return plain


@torch.no_grad()
def _plain_block(source: BranchSum, weights: bool, after: Mapping[str, nn.Module]) -> Any:
    like: Any = source.kxk
    factory = {'device': like.weight.device, 'dtype': like.weight.dtype}
    conv = nn.Conv2d(
        like.in_channels,
        like.out_channels,
        like.kernel_size,
        stride=like.stride,
        padding=like.padding,
        dilation=like.dilation,
        groups=like.groups,
        bias=False,
        **factory,
    )
    conv.weight = nn.Parameter(like.weight.detach().clone(), like.weight.requires_grad)
    if source.norm is not None:
        norm = copy.deepcopy(source.norm)
    else:
        first = source.parts[0].norm
        assert first is not None
        norm = nn.BatchNorm2d(like.out_channels, first.eps, first.momentum, **factory)
    if weights:
        load_merged_(source, conv, norm)
    return PlainBlock(conv, norm, adds_norm=source.norm is None, **after)


def _carry_prior(twin: nn.Module, sums: Mapping[str, BranchSum]) -> None:
    prior: dict[str, Any] = {}
    for name, source in sums.items():
        prior[name] = source.counts if source.initial is None else ConvPrior(source.counts, source.initial(twin, name))
    for name, each in (resolve_prior(twin, prior) if prior else {}).items():
        each.put_on(twin.get_submodule(name))  # type: ignore[arg-type]


def take_over_hooks(old: nn.Module, new: nn.Module) -> None:
    """Gives a module the hooks of the one whose place it takes."""
    for name in _HOOKS:
        if hasattr(old, name):
            getattr(new, name).update(getattr(old, name))
    new._is_full_backward_hook = old._is_full_backward_hook


def replace_modules(model: nn.Module, converted: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replaces modules wherever they are used; a shared one stays shared."""
    if model in converted:
        return converted[model]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in converted:
                parent._modules[name] = converted[child]
    return model
