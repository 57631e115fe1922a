"""Finds scales wherever a user may have them."""

import os
from collections.abc import Sequence
from pathlib import Path

from .architectures import DEFAULT_STRIDES
from .scales import Scales

__all__ = ['ScalesSource', 'load_scales']

ScalesSource = Scales | str | os.PathLike | None


def load_scales(
    source: Scales | str | os.PathLike,
    architecture: str | None = None,
    strides: Sequence[int] = DEFAULT_STRIDES,
) -> Scales:
    """Loads scales from any source.

    Args:
        source: `Scales`, a file (see `Scales.load`), or `initial` for the unsearched values of `architecture`.
        architecture: Name of the target model that the scales are for.
        strides: Its strides.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the source holds no scales, or they do not belong to the architecture with these strides.
    """
    if isinstance(source, Scales):
        scales = source
    elif source == 'initial':
        if architecture is None:
            raise ValueError("scales='initial' needs an architecture to make the values for.")
        scales = Scales.initial(architecture, strides)
    elif Path(source).is_file():
        scales = Scales.load(source, architecture)
    else:
        raise FileNotFoundError(f"No scales found at '{source}': expected a file or 'initial'.")
    if architecture is not None:
        scales.check_target(architecture, strides)
    return scales


def default_scales(model_name: str, strides: Sequence[int] = DEFAULT_STRIDES) -> Scales:
    """Loads the scales that ship for a target model.

    Args:
        model_name: Name of a target model, with or without a tag.
        strides: Its strides.

    Raises:
        ValueError: If there are none; says how to get some.
    """
    architecture = model_name.split('.')[0]
    raise ValueError(
        f'{model_name} has no scales, and none ship for it. Search some with --model {architecture}_hs (or '
        f'--search-first), import some with --scales FILE, or start with the unsearched values: --scales initial.'
    )
