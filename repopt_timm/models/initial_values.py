"""The values that scales started from, found by the name of their network."""

from typing import Any

import timm
import torch

from ..architectures import ARCHITECTURES
from ..names import PREFIX
from ..scales import Scales
from . import ensure_registered

__all__ = ['initial_values']


def initial_values(scales: Scales) -> Scales | None:
    """Returns the initial values for the network that scales state; None if timm does not know its name.

    Of a `repopt_vgg` of other depths and widths than those of the name the numbers are read off the scales' modules.
    """
    name = scales.architecture
    kwargs: dict[str, Any] = {}
    if name in ARCHITECTURES:
        kwargs = _numbers(scales) if 'stem.conv' in scales else {}
    else:
        name = PREFIX + name
        ensure_registered(name)
    if not timm.is_model(name):
        return None
    with torch.device('meta'):
        return Scales.initial(timm.create_model(name, **kwargs))


def _numbers(scales: Scales) -> dict[str, Any]:
    blocks = [(name, vectors) for name, vectors in scales.items() if name.startswith('stages.')]
    stages = [int(name.split('.')[1]) for name, _ in blocks]
    widths = {stage: len(next(iter(vectors.values()))) for stage, (_, vectors) in zip(stages, blocks)}
    stem = len(next(iter(scales['stem.conv'].values())))
    return {'depths': [stages.count(stage) for stage in widths], 'widths': [stem, *widths.values()]}
