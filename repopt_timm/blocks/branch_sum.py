"""One description of a multi-branch block: the sum of its branches, and the BatchNorm that follows the sum."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..reparam import refusal

__all__ = ['BranchSum', 'InitialValue', 'MakePlain', 'Part', 'Reader', 'normalized']


@dataclass(frozen=True)
class Part:
    """One branch of a block.

    Attributes:
        conv: Its convolution; None for an identity.
        norm: The BatchNorm of this branch alone, if it has one.
    """

    conv: nn.Conv2d | None = None
    norm: nn.BatchNorm2d | None = None

    def __post_init__(self) -> None:
        if self.conv is not None and (reason := refusal(self.conv)):
            raise ValueError(reason)
        if self.norm is not None:
            check_norm(self.norm)


@dataclass(frozen=True)
class BranchSum:
    """`norm(sum_b norm_b(conv_b(x)))`: all that a plain convolution and one BatchNorm need to know.

    Attributes:
        parts: The branches; those of the largest kernel come first.
        norm: The BatchNorm that follows the sum, if there is one.
        initial: What scales start from, where a family has a rule of its own. Defaults to `run_scale` of the
            convolution's position in a run of equal channels.
    """

    parts: tuple[Part, ...]
    norm: nn.BatchNorm2d | None = None
    initial: 'InitialValue | None' = None

    def __post_init__(self) -> None:
        expected = _shape(self.kxk)
        if self.norm is not None:
            check_norm(self.norm)
        elif all(part.norm is None for part in self.parts):
            raise ValueError('neither a branch nor the sum is normalized')
        for part in self.parts:
            if part.conv is not None and (found := _shape(part.conv)) != expected:
                raise ValueError(f'a branch has in, out, stride and groups of {found}, the first one has {expected}')

    @property
    def kxk(self) -> nn.Conv2d:
        """The first convolution with the largest kernel."""
        conv = self.parts[0].conv if self.parts else None
        if conv is None:
            raise ValueError('it has no convolution')
        return conv

    def name_of(self, part: Part) -> str:
        """Returns the name of a part's branch; parts of one name are equal branches that share a scale."""
        if part.conv is None:
            return 'identity'
        size = part.conv.kernel_size
        return 'kxk' if size == self.kxk.kernel_size else 'x'.join(map(str, size))

    @property
    def counts(self) -> dict[str, int]:
        """Branch name to the number of equal branches."""
        names = [self.name_of(part) for part in self.parts]
        return {name: names.count(name) for name in sorted(names)}


InitialValue = Callable[[nn.Module, str], float]
"""Returns what the scales of a convolution start from, of the plain network and the convolution's name in it."""

MakePlain = Callable[..., nn.Module]
"""Makes the plain block of a `BranchSum`; what follows its BatchNorm is given by name: `plain(sum, act=nn.ReLU())`."""

Reader = Callable[[Any, MakePlain], nn.Module]
"""Describes a block, and returns what takes its place: a plain block, or the block itself with plain ones inside."""


def normalized(module: Any, conv: str = 'conv', norm: str = 'bn') -> Part:
    """Reads a branch from a module that holds a convolution and its BatchNorm."""
    if not isinstance(getattr(module, 'aa', None), nn.Identity | None):
        raise ValueError(f'{type(module).__name__} blurs its output between convolution and sum')
    return Part(getattr(module, conv), getattr(module, norm))


def check_norm(norm: Any) -> None:
    """Raises a ValueError unless the module normalizes like `nn.BatchNorm2d` and does nothing else."""
    extra = [getattr(norm, name, None) for name in ('drop', 'act')]
    if any(each is not None and not isinstance(each, nn.Identity) for each in extra):
        raise ValueError(f'{type(norm).__name__} of a branch drops or activates; set drop_block_rate=0')
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        raise ValueError(f'{type(norm).__name__} of a branch is not a BatchNorm2d with running statistics')


def _shape(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.in_channels, conv.out_channels, conv.stride, conv.groups
