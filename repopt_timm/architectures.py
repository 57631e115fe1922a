"""The RepOpt-VGG architectures as plain data: depths and widths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """Depth of each stage, and widths of the stem and of each stage.

    `use_se` adds attention to each block: after the ReLU, in the `_branches` network before it.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    use_se: bool = False

    def with_numbers(self, depths: Sequence[int] | None = None, widths: Sequence[int] | None = None) -> 'Architecture':
        """Returns the architecture with other depths or widths; None keeps its own."""
        chosen = replace(self, depths=tuple(depths or self.depths), widths=tuple(widths or self.widths))
        if len(chosen.widths) != len(chosen.depths) + 1 or min(*chosen.depths, *chosen.widths) < 1:
            raise ValueError(
                f'depths={chosen.depths} and widths={chosen.widths}: expected positive numbers, one width more than '
                f'depths, for the stem and each stage. Give both.'
            )
        return chosen

    def out_channels(self) -> dict[str, int]:
        """Returns the module name of each convolution, to its number of output channels."""
        channels = {'stem.conv': self.widths[0]}
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths[1:])):
            channels |= {f'stages.{stage}.{index}.conv': width for index in range(depth)}
        return channels


def _vgg(depths: tuple[int, ...], factor: float, last: float, base: int = 64, use_se: bool = False) -> Architecture:
    widths = [int(base * width) for width in (factor, 2 * factor, 4 * factor, 8 * last)]
    return Architecture(depths, (min(base, widths[0]), *widths), use_se)


_A, _B, _L = (2, 4, 14, 1), (4, 6, 16, 1), (8, 14, 24, 1)

# Depths and width factors: table 2 of RepVGG (arXiv 2101.03697); L1 and L2: section 4.1 of arXiv 2205.15242.
ARCHITECTURES: dict[str, Architecture] = {
    'repopt_vgg_a0': _vgg(_A, 0.75, 2.5),
    'repopt_vgg_a1': _vgg(_A, 1.0, 2.5),
    'repopt_vgg_a2': _vgg(_A, 1.5, 2.75),
    'repopt_vgg_b0': _vgg(_B, 1.0, 2.5),
    'repopt_vgg_b1': _vgg(_B, 2.0, 4.0),
    'repopt_vgg_b2': _vgg(_B, 2.5, 5.0),
    'repopt_vgg_b3': _vgg(_B, 3.0, 5.0),
    'repopt_vgg_l1': _vgg(_L, 2.0, 4.0),
    'repopt_vgg_l2': _vgg(_L, 2.5, 5.0),
    'repopt_vgg_d2se': _vgg(_L, 2.5, 5.0, use_se=True),
    # For depths and widths of the user's own: A0's unless given.
    'repopt_vgg': _vgg(_A, 0.75, 2.5),
    'test_repopt_vgg': _vgg((1, 2, 2, 1), 1.0, 1.0, base=16),
}


def infer_architecture(channels: Mapping[str, int], preferred: str | None = None) -> str | None:
    """Finds the architecture whose convolutions have these names and numbers of output channels; None if none fits.

    `preferred` is the answer where several fit: squeeze-and-excitation leaves no trace in the convolutions.
    """
    fitting = [name for name, each in ARCHITECTURES.items() if each.out_channels() == dict(channels)]
    return preferred if preferred in fitting else next(iter(fitting), None)


def chosen_numbers(scales: Any) -> dict[str, Any]:
    """Returns the arguments of `timm.create_model` by which the network of `Scales` differs from its architecture."""
    own = ARCHITECTURES.get(scales.architecture)
    if 'stem.conv' not in scales or not (own or scales.architecture.startswith('mobileone_')):
        return {}
    stages: dict[str, list[str]] = {}
    for name in scales:
        stages.setdefault(name.removesuffix('.conv').rpartition('.')[0], []).append(name)
    firsts = [names[0] for names in stages.values()]
    theirs: dict[str, tuple[int, ...]] = {'strides': (2,) * len(firsts)}
    numbers = {'strides': tuple(scales.geometry[name].stride[0] if scales.geometry else 2 for name in firsts)}
    if own:
        theirs |= {'depths': own.depths, 'widths': own.widths}
        numbers['depths'] = tuple(map(len, list(stages.values())[1:]))
        numbers['widths'] = tuple(len(scales[name]['kxk']) for name in firsts)
    return {name: each for name, each in numbers.items() if each != theirs[name]}
