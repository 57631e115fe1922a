"""The structural prior of a plain network: which convolution has which branches, and what their scales start from.

Deeper convolutions start with smaller scales, so that a sum of branches does not grow with depth (section 4.1 of arXiv
2205.15242).
"""

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .branches import BranchCounts, make_branches
from .modules import modules_of, pair, unwrap

FOLDING_CLASSES: set[str] = set()
"""Names of classes whose `fuse()` or `reparameterize()` only folds normalization."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConvPrior:
    """The branches that a convolution has in a Hyper-Search, by count, and the value that their scales start from.

    `stride` is the stride at construction, if an `output_stride` has changed it since; else None.
    """

    branches: dict[str, int]
    initial: float = 1.0
    stride: tuple[int, int] | None = None

    def put_on(self, conv: Any) -> None:
        """Lets the convolution carry the prior."""
        conv.repopt_prior = self


Prior = Mapping[str, BranchCounts | ConvPrior] | Callable[[nn.Module], Mapping[str, BranchCounts | ConvPrior]]
"""Module name to branches, or a function that returns such a mapping for a model."""


class RefusedConv(NamedTuple):
    """A convolution that cannot have branches."""

    name: str
    type: str
    reason: str


def carried_priors(model: nn.Module) -> dict[str, ConvPrior]:
    """Collects the priors that the convolutions of a model carry, by module name."""
    modules = modules_of(model)
    return {name: vars(each)['repopt_prior'] for name, each in modules.items() if 'repopt_prior' in vars(each)}


def stage_scale(index: int) -> float:
    """Initial scale in a RepOpt-VGG: `sqrt(2 / l)` for the block of index l in its stage, 1 for l = 0 (section 4.1)."""
    return math.sqrt(2.0 / index) if index > 0 else 1.0


def run_scale(position: int) -> float:
    """Initial scale elsewhere: `sqrt(2 / (n + 1))` for the n-th convolution, from 1, of a run of equal channels."""
    # Published for RepGhostNet: github.com/DingXiaoH/RepOptimizers, repoptimizer/repoptghostnet_model.py.
    return math.sqrt(2.0 / (position + 1))


def repvgg_branches(conv: nn.Conv2d) -> dict[str, int]:
    """Returns the branches of a RepVGG block: kxk, 1x1 in a larger kernel, identity where channels and stride allow."""
    names = ['kxk']
    if tuple(conv.kernel_size) != (1, 1):
        names.append('1x1')
    if conv.in_channels == conv.out_channels and pair(conv.stride) == (1, 1):
        names.append('identity')
    return dict.fromkeys(sorted(names), 1)


def repvgg_prior(model: nn.Module) -> dict[str, ConvPrior]:
    """Gives each convolution that can be converted the branches of a RepVGG block.

    A model whose convolutions carry a prior, as RepOpt-VGG's do, states its own, which is returned. In others,
    scales start at `sqrt(2 / (n + 1))`, where n = 1, 2, … counts the convolutions of a run of equal channels and stride
    1, and starts again where one of them changes. Convolutions that cannot be converted are left out; `refused_convs`
    lists them.

    Args:
        model: Any network.

    Returns:
        Module name to prior, in the order of the model's modules.

    Raises:
        ValueError: If the model has multi-branch blocks of its own, or no convolution that can be converted.
    """
    model = unwrap(model)
    convs: dict[str, Any] = {
        name: conv for name, conv in modules_of(model).items() if isinstance(conv, nn.Conv2d) and not refusal(conv)
    }
    carried = {name: prior for name, prior in carried_priors(model).items() if name in convs}
    return resolve_prior(model, carried or {name: repvgg_branches(conv) for name, conv in convs.items()})


def resolve_prior(model: nn.Module, prior: Prior | None = None) -> dict[str, ConvPrior]:
    """Makes a checked mapping, in the order of the model's modules, of any form of prior.

    Args:
        model: Network whose modules it names.
        prior: Module name to branch names, to {branch name: count} or to `ConvPrior`; or a function that returns such a
            mapping for the model. Defaults to `repvgg_prior`.
    """
    if prior is None:
        return repvgg_prior(model)
    for name, block in multi_branch_blocks(model):
        raise ValueError(
            f"'{name}' of {type(model).__name__} is a {type(block).__name__} whose method `reparameterize` or `fuse` "
            f'merges branches. Make its plain twin first, plain_twin(model), or mark it: keep_branches(block).'
        )
    mapping: dict[str, Any] = dict(prior(model) if callable(prior) else prior)
    if not mapping:
        raise ValueError(f'No convolution of {type(model).__name__} gets branches: see refused_convs(model) for why.')
    resolved = {}
    position, channels = 0, 0
    for name, conv in modules_of(model).items():
        if not isinstance(conv, nn.Conv2d) or name not in mapping:
            continue
        same = conv.in_channels == conv.out_channels == channels and pair(conv.stride) == (1, 1)
        position, channels = (position + 1 if same else 1), conv.out_channels
        if reason := refusal(conv):
            raise ValueError(f"'{name}' of {type(model).__name__} cannot have branches: {reason}.")
        given = mapping.pop(name)
        given = given if isinstance(given, ConvPrior) else ConvPrior(given, run_scale(position))
        try:
            branches = make_branches(given.branches, conv)
        except ValueError as error:
            raise ValueError(f"'{name}': {error}") from None
        resolved[name] = replace(given, branches={branch.name: branch.count for branch in branches})
    if mapping:
        raise ValueError(f"{type(model).__name__} has no convolution '{next(iter(mapping))}', which the prior names.")
    return resolved


def refused_convs(model: nn.Module) -> list[RefusedConv]:
    """Lists the convolutions of a model, of any dimension, that cannot have branches: name, type and reason."""
    convs = [(name, each) for name, each in modules_of(unwrap(model)).items() if isinstance(each, _ConvNd)]
    return [RefusedConv(name, type(conv).__name__, reason) for name, conv in convs if (reason := refusal(conv))]


def log_convs_without(model: nn.Module, having: Collection[str], what: str, level: int = logging.INFO) -> None:
    """Logs one line with the convolutions of a model that are not among the names in `having`, by the reason why."""
    without: dict[str, list[str]] = {}
    for name, conv in modules_of(model).items():
        if isinstance(conv, nn.Conv2d) and name not in having:
            without.setdefault(refusal(conv) or 'no scales', []).append(name)
    if without:
        count = sum(map(len, without.values()))
        listed = '; '.join(f'{", ".join(names)} ({reason})' for reason, names in without.items())
        _logger.log(level, f'{type(model).__name__}: {count} convolution(s) {what}: {listed}')


def refusal(conv: nn.Module) -> str | None:
    """Says why a module cannot be converted to a CSLA convolution; None if it can.

    A window can be embedded at the centre of a kernel only if all sizes are odd and the padding is
    `dilation * (kernel_size - 1) / 2`.
    """
    if type(conv) is not nn.Conv2d:
        return f'{type(conv).__name__} is not exactly nn.Conv2d, so it may not compute the convolution of its weight'
    weight = conv._parameters.get('weight')
    if weight is None or weight.ndim != 4:
        return 'its weight is computed from other parameters (pruned, weight-normalized, or kept flat by FSDP1)'
    if {'forward', '_conv_forward'} & set(vars(conv)):
        return 'its forward method was replaced on the instance, so it may compute something else'
    if conv.padding_mode != 'zeros':
        return f"it pads with padding_mode='{conv.padding_mode}', not with zeros"
    if any(size % 2 == 0 for size in conv.kernel_size):
        return f'its kernel size {tuple(conv.kernel_size)} is even, so no branch can be embedded at the centre'
    centred = tuple(dilation * (size - 1) // 2 for dilation, size in zip(pair(conv.dilation), conv.kernel_size))
    padding = (centred if conv.padding == 'same' else (0, 0)) if isinstance(conv.padding, str) else pair(conv.padding)
    if padding != centred:
        return f'its padding is {padding}, expected dilation * (kernel_size - 1) / 2 = {centred}'
    return None


def multi_branch_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields name and module of blocks whose `reparameterize()` or `fuse()` merges branches, see `keep_branches`."""
    kept: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if hasattr(module, 'repopt_keeps_branches'):
            kept += (f'{name}.' if name else '',)
        if f'{name}.'.startswith(kept) or type(module).__name__ in FOLDING_CLASSES or _is_merged(module):
            continue
        # A submodule of that name can be called too.
        methods = [getattr(module, method, None) for method in ('reparameterize', 'fuse')]
        if not any(callable(each) and not isinstance(each, nn.Module) for each in methods):
            continue
        if any(isinstance(part, nn.Conv2d) for part in module.modules()):
            yield name, module


def keep_branches(block: Any) -> None:
    """Marks a block with a method `reparameterize` or `fuse` as plain, or as one whose branches are meant to stay."""
    block.repopt_keeps_branches = True


def _is_merged(block: Any) -> bool:
    # How multi-branch blocks of timm remember that their branches are merged already.
    return (
        isinstance(getattr(block, 'reparam_conv', None), nn.Conv2d)
        or getattr(block, 'infer_mode', None) is True
        or getattr(block, 'fused', None) is True
        or (hasattr(block, 'fusion_bn') and len(block.fusion_bn) == 0)
        or (hasattr(block, 'dw_conv_list') and block.dw_conv_list is None)
    )
