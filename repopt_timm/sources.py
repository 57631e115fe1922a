"""Finds scales wherever a user may have them."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from timm.models import is_model_pretrained, parse_model_name
from torch import nn

from .cards.document import CARD_FILE, read_card_scales, read_metadata
from .cards.format import METADATA_KEY
from .cards.transfer import HUB_PREFIX, HubFileNotFoundError, cached_files, download, parse_hub_source
from .errors import explaining
from .names import ModelName
from .reparam import network_name, scales_for
from .resources import shipped_repositories
from .scales import Scales, read_scale_file
from .scales.published import PUBLISHED, find_published, published_table, read_published

__all__ = ['IMPLIED', 'ScalesSource', 'default_scales', 'known_scales', 'load_scales', 'scales_beside_weights']

ScalesSource = Scales | Mapping | str | os.PathLike

IMPLIED = 'implied'
"""Names the scales that pretrained weights with branches imply, for their fine-tuning."""


def load_scales(source: ScalesSource, model: nn.Module | None = None, token: str | bool | None = None) -> Scales:
    """Loads scales from any source, and checks that they belong to a model.

    Args:
        source: `Scales`; module name to branch name to vector, for `model`; `initial` for the unsearched values of
            `model`; `published` for what the method's authors published for `model`, or its name, such as
            `repopt_vgg_b1.published`; `hf-hub:user/repo[@revision]`; a folder in the layout of such a repository, or
            the name of one that ships, such as `repopt_vgg_a0.cifar10`; a model card; or a file, see `read_scale_file`.
        model: The plain model, or a twin, that they are for.
        token: For the Hub. Defaults to the token of `hf auth login`.

    Returns:
        The scales; with a model, under its name and with its geometry.

    Raises:
        FileNotFoundError: If there is no such file, folder or shipped name.
        HubError: If the repository cannot be read.
        OSError: If published scales cannot be downloaded.
        ValueError: If the source holds no scales, or they do not belong to the model.
    """
    if isinstance(source, Mapping) and not isinstance(source, Scales):
        if model is None:
            raise ValueError('A mapping of scales needs the model that it is for: load_scales(mapping, model).')
        return scales_for(model, source)
    if not isinstance(source, Scales | str | os.PathLike):
        raise ValueError(
            f"scales={source!r:.80} is a {type(source).__name__}, expected a file, a folder, 'hf-hub:user/repo', "
            f"'initial', 'published', Scales, or a mapping of module names to vectors. Scales go by module name, never "
            f'by position.'
        )
    if isinstance(source, Scales):
        scales = source
    elif source == 'initial':
        if model is None:
            raise ValueError(
                "scales='initial' needs a model to make the values for: load_scales('initial', model), or "
                '--architecture MODEL.'
            )
        return Scales.initial(model)
    elif source == PUBLISHED:
        if model is None:
            raise ValueError(
                f"scales='{PUBLISHED}' needs a model to know which: load_scales('{PUBLISHED}', model), --architecture "
                f'MODEL, or one of the names {", ".join(published_table())}.'
            )
        scales = read_published(network_name(model))
    elif source in published_table():
        scales = read_published(str(source))
    elif source == IMPLIED:
        raise ValueError(
            f"scales='{IMPLIED}' are read from trained branches. Create a target with pretrained=True and weights that "
            f"were trained with branches, such as 'repopt_mobileone_s0.apple_in1k'."
        )
    elif isinstance(source, str) and source.startswith(HUB_PREFIX):
        hub = parse_hub_source(source)
        fetch = partial(download, hub.repo_id, revision=hub.revision, token=token)
        scales = read_card_scales(fetch(CARD_FILE), str(hub), fetch)
    else:
        scales = _read_local(Path(source), None if model is None else network_name(model))
    return scales if model is None else scales.for_model(model)


def _read_local(path: Path, architecture: str | None) -> Scales:
    if path.is_file():
        return read_card_scales(path) if path.suffix == '.md' else read_scale_file(path, architecture)
    shipped = shipped_repositories()
    folder = path if path.is_dir() else shipped.get(str(path))
    if folder is None:
        raise FileNotFoundError(
            f"No scales found at '{path}': expected a file, a folder with a model card, {HUB_PREFIX}user/repo, "
            f"'initial', one that ships ({', '.join(shipped) or 'none do'}) or is published "
            f'({", ".join(published_table())}).'
        )
    if not (folder / CARD_FILE).is_file():
        raise FileNotFoundError(f"No scales found in the folder '{folder}': it has no {CARD_FILE}.")
    return read_card_scales(folder / CARD_FILE)


def default_scales(model_name: str) -> Scales:
    """Loads the scales that come with a model's name: in its repository, or in what ships with this package.

    Args:
        model_name: Name of a target model, with or without a tag, `hf-hub:user/repo` or `local-dir:FOLDER`.

    Raises:
        ValueError: If there are none; says how to get some.
        OSError: If the repository or folder cannot be read.
    """
    with explaining(f"'{model_name}' is not the name of a model"):
        place, name = parse_model_name(model_name)
    if place is not None:
        return load_scales(HUB_PREFIX + name if place == 'hf-hub' else name)
    architecture = ModelName.parse(model_name).architecture
    names = [name for name in shipped_repositories() if ModelName.parse(name).architecture == architecture]
    if '.' in model_name:
        # Other weights of the architecture were trained with other scales, or with none.
        names = [name for name in names if name == model_name]
    for name in names:
        scales = _card_scales(shipped_repositories()[name] / CARD_FILE, name)
        if scales is not None:
            return scales
    raise ValueError(
        f'{model_name} has no scales, and none ship for it. Search some with --model {architecture}_hs (or '
        f'--search-first), {_further_sources(model_name)}import some with --scales FILE, or start with the unsearched '
        f'values: --scales initial.'
    )


def _further_sources(model_name: str) -> str:
    """Returns what else a model's scales may come from, for a list in an error."""
    name = ModelName.parse(model_name)
    sources = ''
    if is_model_pretrained('.'.join(filter(None, (name.of_kind('branches'), name.tag)))):
        sources += f'go on with those that the branches of its weights imply: --scales {IMPLIED}, '
    if find_published(name.architecture):
        sources += f"download those of the method's authors with --scales {PUBLISHED}, "
    return sources


def known_scales() -> list[dict[str, Any]]:
    """Lists the scales that ship, that are published, and that the Hub's cache holds.

    Returns:
        Rows with `name`, which `load_scales` takes; `network`, `dataset` and `license`, as far as known; `where`:
        `ships`, `published`, `published, cached` or `cached`.
    """
    rows = []
    for name, folder in shipped_repositories().items():
        rows += _card_row(folder / CARD_FILE, name, 'ships')
    for name, row in published_table().items():
        where = 'published, cached' if row.is_cached else 'published'
        network = ModelName.parse(name).network
        rows.append({'name': name, 'network': network, 'dataset': row.dataset, 'license': row.license, 'where': where})
    for source, card in cached_files(CARD_FILE):
        rows += _card_row(card, str(source), 'cached')
    return rows


def _card_row(card: Path, name: str, where: str) -> list[dict[str, Any]]:
    try:
        metadata = read_metadata(card)
        scales = read_card_scales(card) if METADATA_KEY in metadata else None
    except (OSError, ValueError):
        # Somebody else's card, of which there may be any kind in a cache.
        return []
    if scales is None:
        return []
    facts = {'dataset': scales.provenance.get('dataset'), 'license': metadata.get('license')}
    return [{'name': name, 'network': scales.architecture, **facts, 'where': where}]


def scales_beside_weights(cfg: Mapping[str, Any]) -> Scales | None:
    """Reads the scales of the repository that pretrained weights come from.

    Args:
        cfg: timm's configuration of the weights: `source`, `file`, `hf_hub_id`.

    Returns:
        The scales; None if the repository has no card, or a card without scales.

    Raises:
        HubError: If the repository cannot be read.
        ValueError: If the card is damaged, or of another version.
    """
    if cfg.get('source') == 'local-dir':
        return _card_scales_if_any(Path(cfg['file']) / CARD_FILE)
    if cfg.get('source') != 'hf-hub' and cfg.get('file'):
        return _card_scales_if_any(Path(cfg['file']).parent / CARD_FILE)
    if not cfg.get('hf_hub_id'):
        return None
    source = parse_hub_source(HUB_PREFIX + cfg['hf_hub_id'])
    fetch = partial(download, source.repo_id, revision=source.revision)
    try:
        card = fetch(CARD_FILE)
    except HubFileNotFoundError:
        return None
    return _card_scales(card, str(source), fetch)


def _card_scales_if_any(card: Path) -> Scales | None:
    return _card_scales(card, str(card)) if card.is_file() else None


def _card_scales(card: Path, source: str, fetch: Callable[[str], Path] | None = None) -> Scales | None:
    return read_card_scales(card, source, fetch) if METADATA_KEY in read_metadata(card, source) else None
