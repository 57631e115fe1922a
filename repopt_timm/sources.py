"""Finds scales wherever a user may have them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .architectures import DEFAULT_STRIDES
from .cards.format import CARD_FILE, METADATA_KEY, read_metadata
from .cards.transfer import HUB_PREFIX, HubFileNotFoundError, download, parse_hub_source
from .resources import shipped_repositories
from .scales import Scales

__all__ = ['ScalesSource', 'default_scales', 'load_scales', 'scales_beside_weights']

ScalesSource = Scales | str | os.PathLike | None


def load_scales(
    source: Scales | str | os.PathLike,
    architecture: str | None = None,
    strides: Sequence[int] = DEFAULT_STRIDES,
) -> Scales:
    """Loads scales from any source.

    Args:
        source: `Scales`; `initial` for the unsearched values of `architecture`; `hf-hub:user/repo[@revision]`; a folder
            in the layout of such a repository, or the name of one that ships, such as `repopt_vgg_a0.cifar10`; a model
            card; or a file, see `Scales.load`.
        architecture: Name of the target model that the scales are for.
        strides: Its strides.

    Raises:
        FileNotFoundError: If there is no such file, folder or shipped name.
        HubError: If the repository cannot be read.
        ValueError: If the source holds no scales, or they do not belong to the architecture with these strides.
    """
    if isinstance(source, Scales):
        scales = source
    elif source == 'initial':
        if architecture is None:
            raise ValueError("scales='initial' needs an architecture to make the values for.")
        scales = Scales.initial(architecture, strides)
    elif isinstance(source, str) and source.startswith(HUB_PREFIX):
        scales = Scales.from_hub(*parse_hub_source(source))
    else:
        scales = _read_local(Path(source), architecture, strides)
    if architecture is not None:
        scales.check_target(architecture, strides)
    return scales


def _read_local(path: Path, architecture: str | None, strides: Sequence[int]) -> Scales:
    if path.is_file():
        return Scales.from_card(path) if path.suffix == '.md' else Scales.load(path, architecture, strides)
    shipped = shipped_repositories()
    folder = path if path.is_dir() else shipped.get(str(path))
    if folder is None:
        raise FileNotFoundError(
            f"No scales found at '{path}': expected a file, a folder with a model card, {HUB_PREFIX}user/repo, "
            f"'initial', or one that ships: {', '.join(shipped) or 'none do'}."
        )
    if not (folder / CARD_FILE).is_file():
        raise FileNotFoundError(f"No scales found in the folder '{folder}': it has no {CARD_FILE}.")
    return Scales.from_card(folder / CARD_FILE)


def default_scales(model_name: str, strides: Sequence[int] = DEFAULT_STRIDES) -> Scales:
    """Loads the scales that ship for a target model.

    Args:
        model_name: Name of a target model, with or without a tag.
        strides: Its strides.

    Raises:
        ValueError: If there are none; says how to get some.
    """
    architecture = model_name.split('.')[0]
    names = [name for name in shipped_repositories() if name.split('.')[0] == architecture]
    if model_name in names:
        names = [model_name]
    for name in names:
        scales = _card_scales(shipped_repositories()[name] / CARD_FILE, name)
        if scales is not None:
            scales.check_target(architecture, strides)
            return scales
    raise ValueError(
        f'{model_name} has no scales, and none ship for it. Search some with --model {architecture}_hs (or '
        f'--search-first), import some with --scales FILE, or start with the unsearched values: --scales initial.'
    )


def scales_beside_weights(cfg: Mapping[str, Any]) -> Scales | None:
    """Reads the scales of the repository that pretrained weights come from.

    Args:
        cfg: timm's configuration of the weights: `source`, `file`, `hf_hub_id`.

    Returns:
        The scales, or None if the repository has no card, or none with scales.

    Raises:
        HubError: If the repository cannot be read.
        ValueError: If the card is damaged, or newer than this package.
    """
    if cfg.get('source') == 'local-dir':
        return _card_scales_if_any(Path(cfg['file']) / CARD_FILE)
    if cfg.get('source') != 'hf-hub' and cfg.get('file'):
        return _card_scales_if_any(Path(cfg['file']).parent / CARD_FILE)
    if not cfg.get('hf_hub_id'):
        return None
    source = parse_hub_source(HUB_PREFIX + cfg['hf_hub_id'])
    try:
        card = download(source.repo_id, CARD_FILE, source.revision)
    except HubFileNotFoundError:
        return None
    return _card_scales(card, str(source))


def _card_scales_if_any(card: Path) -> Scales | None:
    return _card_scales(card, str(card)) if card.is_file() else None


def _card_scales(card: Path, source: str) -> Scales | None:
    return Scales.from_card(card, source) if METADATA_KEY in read_metadata(card, source) else None
