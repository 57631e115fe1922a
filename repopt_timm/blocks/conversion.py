"""The plain twin of a multi-branch network of timm: one convolution and one BatchNorm for each of its blocks."""

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..reparam import (
    FOLDING_CLASSES,
    Branch,
    ConvPrior,
    Scales,
    branches_of,
    drop_scales,
    embed,
    geometry_of,
    keep_branches,
    merge_branches,
    multi_branch_blocks,
    network_name,
    resolve_prior,
)
from .readers import KEPT, READERS, BranchSum

# Classes whose `fuse()` or `reparameterize()` folds normalization into one convolution, or calls that of its children.
FOLDING_CLASSES.update([
    'Conv2dNorm', 'ConvLayer1d', 'ConvLayer2d', 'ConvNorm', 'IFormer', 'LinearNorm', 'NextConvBlock',
    'NextTransformerBlock', 'NormLinear', 'PlainBlock', 'RepOptVggBlock', 'RepVit', 'RepVitClassifier', 'SHViT',
])  # fmt: skip


class PlainBlock(nn.Module):
    """What takes the place of a multi-branch block: `conv`, `bn`, then attention and activation under their names.

    `adds_norm` says that the block had no BatchNorm after the sum of its branches. The statistics of one that was added
    are estimates after a merge; see `recalibrate`.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.Module, adds_norm: bool = True, **after: nn.Module):
        super().__init__()
        for name, module in {'conv': conv, 'bn': bn, **after}.items():
            self.add_module(name, module)
        self.adds_norm = adds_norm

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x

    def fuse(self) -> nn.Module:
        """Merges branches of a twin and folds BatchNorm into the convolution, which drops its scales, and returns self.

        `timm.utils.reparameterize_model` calls it. A norm without running statistics stays.
        """
        conv: Any = self.conv
        norm: Any = self.bn
        if branches_of(conv):
            merge_branches(conv)
        # A frozen or synchronized BatchNorm is of another class.
        if getattr(norm, 'running_var', None) is not None:
            # The scales belong to the kernel before BatchNorm is folded into it.
            drop_scales(conv)
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            self.add_module('bn', getattr(norm, 'act', nn.Identity()))
        return self


class BlockReport(NamedTuple):
    """What became of a multi-branch block: convolution to branch name to count, or the reason why it was left."""

    name: str
    type: str
    branches: dict[str, dict[str, int]]
    reason: str = ''


def plain_twin(model: nn.Module, weights: bool = False) -> nn.Module:
    """Makes the plain twin of a multi-branch network of timm: one convolution, one BatchNorm in each block's place.

    Attention and activations stay where they are. The convolutions carry the prior that the block's branches state, so
    that `Scales.initial`, `hyper_search` and `csla` know it. `report_twin` lists what is converted and what is left.

    Args:
        model: The network; any part of one will do. It is not changed.
        weights: Merge the trained branches into the twin, whose logits in evaluation mode then equal the model's.
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
    return _convert(model, weights)[0]


def report_twin(model: nn.Module) -> list[BlockReport]:
    """Lists what `plain_twin` makes of the multi-branch blocks of a model, in its order.

    Raises:
        ValueError: See `plain_twin`.
    """
    return _convert(model)[2]


def implied_scales(model: nn.Module) -> Scales:
    """Reads the scales of a trained multi-branch network, to fine-tune its merged plain twin with a RepOptimizer.

    A branch counts with gamma / sigma of its BatchNorm in the sum, which is what the scale of a CSLA branch is. Equal
    branches share the root of their mean square, which gives the same Grad Mult under SGD. An identity's value is that
    of its operator, whose Grad Mult is 1. Each |scale| is clamped to between 1/30 and 30 times the median, over
    channels, of the strongest branch's. The provenance counts the clamped values.

    Args:
        model: Trained multi-branch network; it is not changed.

    Returns:
        Scales for `plain_twin(model, weights=True)`.

    Raises:
        ValueError: See `plain_twin`.
    """
    twin, sums, _ = _convert(model)
    modules: dict[str, dict[str, Tensor]] = {}
    bounded = 0
    for name, source in sums.items():
        vectors = modules[name] = {}
        for branch in source.counts:
            parts = [part for each, part in zip(source.names, source.parts) if each == branch]
            equal = [_gain(part.norm, source.kxk.weight).detach() for part in parts]
            vectors[branch] = equal[0] if len(equal) == 1 else torch.stack(equal).square().mean(0).sqrt()
        scaled = {branch: vector.abs() for branch, vector in vectors.items() if branch != 'identity'}
        typical = torch.stack(list(scaled.values())).amax(0).median().item() or 1.0
        for branch, size in scaled.items():
            # SGD multiplies gradients with the square: a channel may train a thousand times slower than a typical one.
            within = size.clamp(typical / 30, typical * 30)
            bounded += int((size != within).sum())
            vectors[branch] = within.where(vectors[branch] >= 0, -within)
    provenance = {'method': 'implied by trained branches', 'bounded_channels': bounded}
    counts = {name: source.counts for name, source in sums.items()}
    return Scales(network_name(twin), modules, geometry_of(twin, modules), counts, provenance, 'implied')


def _convert(model: nn.Module, weights: bool = False) -> tuple[nn.Module, dict[str, BranchSum], list[BlockReport]]:
    """Makes the plain twin, what each of its convolutions replaces, and the report."""
    twin = copy.deepcopy(model)
    blocks = dict(multi_branch_blocks(twin))
    if not blocks:
        raise ValueError(f'{type(model).__name__} has no multi-branch block: it is plain, or its branches are merged.')
    report = {}
    for name, block in blocks.items():
        kept = _class_of(block) in KEPT
        reason = 'a residual connection around a normalized convolution, not a sum that is normalized' if kept else ''
        report[name] = BlockReport(name, type(block).__name__, {}, reason)
        if kept:
            keep_branches(block)
    sources: dict[nn.Module, tuple[str, BranchSum]] = {}
    converted: dict[nn.Module, nn.Module] = {}
    for name, block in multi_branch_blocks(twin):
        try:
            if _class_of(block) not in READERS:
                raise ValueError('plain_twin does not know this class')
            new = READERS[_class_of(block)](block, partial(_make_plain, sources, name, weights))
        except ValueError as error:
            raise ValueError(
                f"'{name}' of {type(model).__name__} is a {type(block).__name__} that cannot become plain: {error}."
            ) from None
        if new is not block:
            converted[block] = new
            vars(new).update({key: value for key, value in vars(block).items() if '_hook' in key and 'load' not in key})
    twin = converted.get(twin, twin)
    # A shared block is replaced everywhere, so it stays shared.
    for parent in list(twin.modules()):
        for child_name, child in parent._modules.items():
            parent._modules[child_name] = converted.get(child, child)  # type: ignore[arg-type]
    sums: dict[str, BranchSum] = {}
    prior: dict[str, Any] = {}
    for name, conv in twin.named_modules():
        if conv not in sources:
            continue
        block_name, source = sources[conv]
        sums[name] = source
        report[block_name].branches[name] = prior[name] = source.counts
        if source.initial is not None:
            prior[name] = ConvPrior(source.counts, source.initial(twin, name))
    for name, found in (resolve_prior(twin, prior) if prior else {}).items():
        found.put_on(twin.get_submodule(name))  # type: ignore[arg-type]
    return twin, sums, [each for each in report.values() if each.branches or each.reason]


def _class_of(block: nn.Module) -> str:
    return f'{type(block).__module__}.{type(block).__qualname__}'


@torch.no_grad()
def _make_plain(
    sources: dict[nn.Module, tuple[str, BranchSum]], name: str, weights: bool, source: BranchSum, **after: nn.Module
) -> nn.Module:
    """Makes a plain block, and notes in `sources` what its convolution replaces in the block `name`."""
    conv, norm = copy.deepcopy(source.kxk), copy.deepcopy(source.norm)
    conv.bias = None
    if norm is None:
        first: Any = source.parts[0].norm
        kernel = conv.weight
        norm = nn.BatchNorm2d(len(kernel), first.eps, first.momentum, device=kernel.device, dtype=kernel.dtype)
    if weights:
        _load_merged_(source, conv, norm)
    sources[conv] = name, source
    return PlainBlock(conv, norm, adds_norm=source.norm is None, **after).train(conv.training)


def _load_merged_(source: BranchSum, conv: nn.Conv2d, norm: Any) -> None:
    """Fills convolution and BatchNorm so that both compute in evaluation mode what the branches do.

    The kernel is `W' = sum_b gamma_b / sigma_b * A_b theta_b`. A BatchNorm that followed the sum keeps gamma, beta and
    variance, and its mean moves by the branches' offsets. One that is added gets the branches' mean
    `sum_b gamma_b / sigma_b * mu_b`, which is exact, and `sum_b gamma_b^2` for its variance, as if branches did not
    correlate: gamma undoes it, so that the function stays, and `recalibrate` replaces it.
    """
    kernel = torch.zeros_like(conv.weight, dtype=torch.float64)
    beta, offset, variance = kernel.new_zeros(3, len(kernel))
    parts: Any = source.parts
    for name, (own_conv, own_norm) in zip(source.names, parts):
        gain = _gain(own_norm, kernel)
        operator = kernel.new_ones(len(kernel), 1, 1, 1) if own_conv is None else own_conv.weight
        kernel += embed(gain.view(-1, 1, 1, 1) * operator, kernel.shape, Branch.of(name, conv.kernel_size))
        if own_conv is not None and own_conv.bias is not None:
            offset += gain * own_conv.bias
        if own_norm is not None:
            offset += own_norm.bias - gain * own_norm.running_mean
        if source.norm is None:
            beta += own_norm.bias
            variance += own_norm.weight.double() ** 2
    conv.weight.copy_(kernel)
    if source.norm is not None:
        norm.running_mean -= offset
        return
    norm.running_mean.copy_(beta - offset)
    norm.running_var.copy_(variance)
    norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
    norm.bias.copy_(beta)


def _gain(norm: Any, kernel: Tensor) -> Tensor:
    """Returns gamma / sigma of a branch's BatchNorm in float64; ones without one."""
    if norm is None:
        return kernel.new_ones(len(kernel), dtype=torch.float64)
    return norm.weight * (norm.running_var.double() + norm.eps).rsqrt()
