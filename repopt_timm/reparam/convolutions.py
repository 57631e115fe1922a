"""Which convolutions of a network can have branches, and the geometry that identifies them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = [
    'FOLDING_CLASSES',
    'ConvPrior',
    'Geometry',
    'RefusedConv',
    'check_no_branches',
    'conv_prior',
    'keep_branches',
    'kernel_of',
    'pair',
    'refusal',
]

_PRIOR_ATTRIBUTE = 'repopt_prior'
_KEPT_ATTRIBUTE = 'repopt_keeps_branches'

_N = r'([1-9]\d{0,8})'
_GEOMETRY = re.compile(rf'(any|[1-9]\d{{0,8}}) -> {_N} channels, {_N}x{_N}, stride {_N}x{_N}, groups {_N}')

# Classes of timm whose `fuse()` or `reparameterize()` folds normalization into one convolution, or calls that of its
# children.
FOLDING_CLASSES = frozenset(
    {
        'Conv2dNorm',
        'ConvLayer1d',
        'ConvLayer2d',
        'ConvNorm',
        'IFormer',
        'LinearNorm',
        'NextConvBlock',
        'NextTransformerBlock',
        'NormLinear',
        'PlainBlock',
        'RepOptVggBlock',
        'RepVit',
        'RepVitClassifier',
        'SHViT',
    }
)


@dataclass(frozen=True)
class ConvPrior:
    """The branches that a convolution has in a Hyper-Search.

    Attributes:
        branches: Branch name to count.
        initial: Value that its scales start from.
        stride: Stride that it was constructed with, where an `output_stride` has changed it since.
    """

    branches: dict[str, int]
    initial: float = 1.0
    stride: tuple[int, int] | None = None

    def put_on(self, conv: nn.Conv2d) -> None:
        """Lets the convolution carry the prior."""
        setattr(conv, _PRIOR_ATTRIBUTE, self)


def conv_prior(conv: nn.Module) -> ConvPrior | None:
    """Returns the prior that a convolution carries, if any."""
    return getattr(conv, _PRIOR_ATTRIBUTE, None)


@dataclass(frozen=True)
class Geometry:
    """What scales were searched on: one convolution, as it was constructed.

    Attributes:
        in_channels: Number of input channels; None for a network's first convolution, which any images may enter.
        out_channels: Number of output channels.
        kernel_size: Height and width.
        stride: Vertical and horizontal stride, before an `output_stride` turned it into dilation.
        groups: Number of groups.
    """

    in_channels: int | None
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, conv: Any, first: bool = False) -> 'Geometry':
        """Reads the geometry of an `nn.Conv2d` or `CSLAConv2d`; `first` says that it is the network's first."""
        prior = conv_prior(conv)
        stride = prior.stride if prior is not None and prior.stride is not None else conv.stride
        return cls(
            in_channels=None if first else conv.in_channels,
            out_channels=conv.out_channels,
            kernel_size=tuple(conv.kernel_size),
            stride=pair(stride),
            groups=conv.groups,
        )

    def has_kernel(self, shape: Sequence[int]) -> bool:
        """Returns whether a kernel of shape (O, I/g, k_h, k_w) may be that of this convolution."""
        inputs = shape[1] if self.in_channels is None else self.in_channels // self.groups
        return tuple(shape) == (self.out_channels, inputs, *self.kernel_size)

    @classmethod
    def parse(cls, text: str) -> 'Geometry':
        """Parses what `str` makes of a geometry, such as `64 -> 128 channels, 3x3, stride 2x2, groups 1`.

        Raises:
            ValueError: If it is not of this form.
        """
        match = _GEOMETRY.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(
                f"'{text!s:.100}' is not a geometry such as '64 -> 128 channels, 3x3, stride 2x2, groups 1'."
            )
        out_channels, height, width, vertical, horizontal, groups = map(int, match.groups()[1:])
        in_channels = None if match[1] == 'any' else int(match[1])
        return cls(in_channels, out_channels, (height, width), (vertical, horizontal), groups)

    def __str__(self) -> str:
        channels = f'{"any" if self.in_channels is None else self.in_channels} -> {self.out_channels} channels'
        kernel, stride = ('x'.join(map(str, pair)) for pair in (self.kernel_size, self.stride))
        return f'{channels}, {kernel}, stride {stride}, groups {self.groups}'


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Returns height and width of a setting of a convolution, of which a single number counts for both."""
    numbers = [value] if isinstance(value, int) else value
    return numbers[0], numbers[-1]


class RefusedConv(NamedTuple):
    """A convolution that cannot have branches."""

    name: str
    type: str
    reason: str


def refusal(conv: nn.Module) -> str | None:
    """Says why a module cannot be converted to a CSLA convolution; None if it can.

    Only a module that is exactly `nn.Conv2d`, and computes the convolution of its own `weight`, is one. A window can be
    embedded at the centre of a kernel only if all sizes are odd and the padding is `dilation * (kernel_size - 1) / 2`.
    """
    if parametrize.is_parametrized(conv):
        if not _only_fake_quantizes(conv):
            return 'a parametrization computes its weight, so it trains another tensor than the kernel'
    elif type(conv) is not nn.Conv2d:
        return f'{type(conv).__name__} is not exactly nn.Conv2d, so it may not compute the convolution of its weight'
    elif conv._parameters.get('weight') is None:
        return 'its weight is computed from other parameters (pruned or weight-normalized, or kept flat by FSDP1)'
    elif conv.weight.ndim != 4:
        return (
            f'its weight has the shape {tuple(conv.weight.shape)}, to which FSDP1, FullyShardedDataParallel, has '
            f'flattened it: use fully_shard, and prepare the model before sharding'
        )
    assert isinstance(conv, nn.Conv2d)
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


def kernel_of(conv: nn.Conv2d) -> Tensor:
    """Returns the tensor that training changes: `weight`, or what a fake quantization is applied to."""
    if parametrize.is_parametrized(conv, 'weight'):
        parametrizations: Any = conv.parametrizations
        return parametrizations['weight'].original
    return conv.weight


def _only_fake_quantizes(conv: nn.Module) -> bool:
    # Its gradient reaches the kernel unchanged (straight-through), so that the kernel is what is trained.
    parametrizations: Any = conv.parametrizations
    if list(parametrizations) != ['weight'] or parametrize.type_before_parametrizations(conv) is not nn.Conv2d:
        return False
    found = parametrizations['weight']
    return hasattr(found, 'original') and all(_is_fake_quantize(each) for each in found)


def _is_fake_quantize(parametrization: nn.Module) -> bool:
    names = {each.__name__ for each in type(parametrization).__mro__}
    return 'FakeQuantizeBase' in names or bool(getattr(parametrization, 'fake_quantizes', False))


def multi_branch_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields name and module of the blocks whose own `reparameterize()` or `fuse()` has branches to merge.

    A block that `keep_branches` marks is not one of them, nor is what it contains.
    """
    kept: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if hasattr(module, _KEPT_ATTRIBUTE):
            kept += (f'{name}.' if name else '',)
        if f'{name}.'.startswith(kept):
            continue
        folds = type(module).__name__ in FOLDING_CLASSES
        if not _has_method(module, 'reparameterize', 'fuse') or folds or _is_merged(module):
            continue
        if any(isinstance(part, nn.Conv2d) for part in module.modules()):
            yield name, module


def _has_method(module: nn.Module, *names: str) -> bool:
    # A submodule of that name can be called too.
    found = [getattr(module, name, None) for name in names]
    return any(callable(each) and not isinstance(each, nn.Module) for each in found)


def keep_branches(block: nn.Module) -> None:
    """Marks a block as plain, or as one whose branches are meant to stay: its convolutions may get branches.

    Without it a module that has convolutions and a method `reparameterize` or `fuse` counts as a multi-branch block.
    """
    setattr(block, _KEPT_ATTRIBUTE, True)


def _is_merged(block: Any) -> bool:
    # How timm's blocks remember that their branches are merged already.
    return (
        isinstance(getattr(block, 'reparam_conv', None), nn.Conv2d)
        or getattr(block, 'infer_mode', None) is True
        or getattr(block, 'fused', None) is True
        or (hasattr(block, 'fusion_bn') and len(block.fusion_bn) == 0)
        or (hasattr(block, 'dw_conv_list') and block.dw_conv_list is None)
    )


def check_no_branches(model: nn.Module) -> None:
    """Raises a ValueError if the model has multi-branch blocks: branches inside of branches help no one."""
    for name, block in multi_branch_blocks(model):
        raise ValueError(
            f"'{name}' of {type(model).__name__} is a {type(block).__name__} with branches of its own, to judge by its "
            f'method `reparameterize` or `fuse`. Make its plain twin first, plain_twin(model), which has one '
            f'convolution in the place of each such block; if it has none, mark it: repopt_timm.keep_branches(block).'
        )
