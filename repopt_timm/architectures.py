"""The RepOpt-VGG architectures as plain data: depths, widths and the convolutions that follow from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .reparam import branch_names

__all__ = ['ARCHITECTURES', 'DEFAULT_STRIDES', 'Architecture', 'ConvSpec', 'infer_architecture', 'initial_scale']

DEFAULT_STRIDES = (2, 2, 2, 2, 2)


@dataclass(frozen=True)
class ConvSpec:
    """One convolution: its module name in the timm model, its channels and stride, its index inside its stage."""

    name: str
    in_channels: int
    out_channels: int
    stride: int
    index: int

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches of the RepOpt-VGG block, sorted."""
        return branch_names(self.in_channels, self.out_channels, (3, 3), (self.stride, self.stride))


@dataclass(frozen=True)
class Architecture:
    """Depths and widths of a RepOpt-VGG variant.

    Attributes:
        depths: Number of blocks in each of the four stages.
        widths: Channels of the stem and of the four stages.
        use_se: Squeeze-and-excitation after the ReLU of every block.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    use_se: bool = False

    def convs(self, strides: Sequence[int] = DEFAULT_STRIDES) -> list[ConvSpec]:
        """Lists the convolutions in the order of the network.

        Args:
            strides: Strides of the stem and of the first block of each stage.

        Raises:
            ValueError: If these are not five values of 1 or 2.
        """
        if len(strides) != 5 or not set(strides) <= {1, 2}:
            raise ValueError(f'strides={tuple(strides)}: expected five values of 1 or 2, for the stem and four stages.')
        specs = [ConvSpec('stem.conv', 3, self.widths[0], strides[0], 0)]
        for stage, depth in enumerate(self.depths):
            for index in range(depth):
                width = self.widths[stage + 1]
                previous = specs[-1].out_channels
                stride = strides[stage + 1] if index == 0 else 1
                specs.append(ConvSpec(f'stages.{stage}.{index}.conv', previous, width, stride, index))
        return specs

    def initial_scales(self, strides: Sequence[int] = DEFAULT_STRIDES) -> dict[str, dict[str, Tensor]]:
        """Returns the values that a Hyper-Search starts from, `sqrt(2 / l)` and 1 for the identity.

        Returns:
            Module name to branch name to vector of shape (O,), float32.
        """
        scales: dict[str, dict[str, Tensor]] = {}
        for spec in self.convs(strides):
            values = {name: 1.0 if name == 'identity' else initial_scale(spec.index) for name in spec.branches}
            scales[spec.name] = {
                name: torch.full((spec.out_channels,), value, device='cpu') for name, value in values.items()
            }
        return scales


def initial_scale(index: int) -> float:
    """Initial value of a block's scales in a Hyper-Search, `sqrt(2 / l)`; 1 for a stage's first block (l = 0)."""
    return math.sqrt(2.0 / index) if index > 0 else 1.0


def _vgg(depths: tuple[int, ...], factors: tuple[float, ...], base: int = 64, use_se: bool = False) -> Architecture:
    widths = [int(base * 2**stage * factor) for stage, factor in enumerate(factors)]
    return Architecture(depths, (min(base, widths[0]), *widths), use_se)


# Depths and width factors: table 2 of RepVGG (arXiv 2101.03697); L1 and L2: section 4.1 of arXiv 2205.15242.
ARCHITECTURES: dict[str, Architecture] = {
    'repopt_vgg_a0': _vgg((2, 4, 14, 1), (0.75, 0.75, 0.75, 2.5)),
    'repopt_vgg_a1': _vgg((2, 4, 14, 1), (1.0, 1.0, 1.0, 2.5)),
    'repopt_vgg_a2': _vgg((2, 4, 14, 1), (1.5, 1.5, 1.5, 2.75)),
    'repopt_vgg_b0': _vgg((4, 6, 16, 1), (1.0, 1.0, 1.0, 2.5)),
    'repopt_vgg_b1': _vgg((4, 6, 16, 1), (2.0, 2.0, 2.0, 4.0)),
    'repopt_vgg_b2': _vgg((4, 6, 16, 1), (2.5, 2.5, 2.5, 5.0)),
    'repopt_vgg_b3': _vgg((4, 6, 16, 1), (3.0, 3.0, 3.0, 5.0)),
    'repopt_vgg_l1': _vgg((8, 14, 24, 1), (2.0, 2.0, 2.0, 4.0)),
    'repopt_vgg_l2': _vgg((8, 14, 24, 1), (2.5, 2.5, 2.5, 5.0)),
    'repopt_vgg_d2se': _vgg((8, 14, 24, 1), (2.5, 2.5, 2.5, 5.0), use_se=True),
    'test_repopt_vgg': _vgg((1, 2, 2, 1), (1.0, 1.0, 1.0, 1.0), base=16),
}


def infer_architecture(channels: Mapping[str, int], preferred: str | None = None) -> str | None:
    """Finds the architecture whose convolutions have these names and widths.

    Args:
        channels: Convolution's module name to its number of output channels.
        preferred: The answer where several fit: squeeze-and-excitation leaves no trace in the convolutions.

    Returns:
        Name of an architecture, or None if there is no such.
    """
    fitting = [
        name
        for name, architecture in ARCHITECTURES.items()
        if {spec.name: spec.out_channels for spec in architecture.convs()} == dict(channels)
    ]
    if preferred in fitting:
        return preferred
    return fitting[0] if fitting else None
