"""Finds scales wherever a user may have them."""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from timm.models import is_model_pretrained, parse_model_name
from torch import nn

from .cards.card import CARD_FILE, METADATA_KEY, SCALES_FILE, read_card_scales
from .cards.hub import HUB_PREFIX, HubFileNotFoundError, cached_files, download, parse_hub_source
from .errors import explaining
from .names import ModelName
from .reparam import network_name, scales_for
from .scales import Scales, read_scale_file
from .scales.published import PUBLISHED, find_published, published_table, read_published

ScalesSource = Scales | Mapping | str | os.PathLike

UNSEARCHED = {'initial': 'paper', 'identity': 'identity'}
"""Names of the unsearched values of any network to the start of their operators."""

IMPLIED = 'implied'
"""Names the scales that pretrained weights with branches imply, for their fine-tuning."""


def load_scales(source: ScalesSource, model: nn.Module | None = None, token: str | bool | None = None) -> Scales:
    """Loads scales from any source, and checks that they belong to a model.

    Args:
        source: `Scales`; module name to branch name to vector, for `model`; `initial` for the unsearched values of
            `model`, or `identity` for these with the start `identity`; `published` for what the method's authors
            published for `model`, or its name, such as `repopt_vgg_b1.published`; `hf-hub:user/repo[@revision]`; a
            folder in the layout of such a repository, or the name of one that ships, such as `repopt_vgg_a0.cifar10`;
            the folder of a search; a model card; or a file, see `read_scale_file`.
        model: The plain model that they are for; or a twin, except for `initial` and `identity`.
        token: For the Hub. Defaults to the token of `hf auth login`.

    Returns:
        The scales; with a model, under its name and with its geometry.

    Raises:
        FileNotFoundError: If there is no such file, folder or shipped name.
        HubError: If the repository cannot be read.
        OSError: If published scales cannot be downloaded.
        ValueError: If the source holds no scales, or they do not belong to the model.
    """
    if isinstance(source, Mapping):
        if model is not None:
            return scales_for(model, source)
        # A mapping states no counts: each branch counts once.
        return source if isinstance(source, Scales) else Scales('', source)
    network = None if model is None else network_name(model)
    if network is None and source in (*UNSEARCHED, PUBLISHED):
        raise ValueError(f"scales='{source}' needs a model: load_scales('{source}', model), or --architecture MODEL.")
    if model is not None and source in UNSEARCHED:
        return Scales.initial(model, start=UNSEARCHED[str(source)])
    scales: Scales | None
    if source == PUBLISHED or source in published_table():
        scales = read_published(network if network and source == PUBLISHED else str(source))
    elif source == IMPLIED:
        raise ValueError(
            f"scales='{IMPLIED}' are read from trained branches. Create a target with pretrained=True and weights that "
            f"were trained with branches, such as 'repopt_mobileone_s0.apple_in1k'."
        )
    elif isinstance(source, str) and source.startswith(HUB_PREFIX):
        scales = read_card_scales(*_hub_card(source, token))
    else:
        path = Path(source) if Path(source).exists() else shipped_repositories().get(str(source))
        if path is None:
            raise FileNotFoundError(
                f"'{source}' is not a file, a folder, a Hub repository ({HUB_PREFIX}user/repo) or a known name. "
                f'`repopt-timm scales list` shows the known names.'
            )
        scales = None
        if path.is_dir():
            # The folder of a search has no card.
            card, path = path / CARD_FILE, path / SCALES_FILE
            scales = read_card_scales(card) if card.is_file() else None
            if scales is None and not path.is_file():
                raise FileNotFoundError(f"The folder '{source}' has no {CARD_FILE} with scales, and no {SCALES_FILE}.")
        if scales is None:
            scales = read_card_scales(path) if path.suffix == '.md' else read_scale_file(path, network)
    if scales is None:
        raise ValueError(f"{source}: no scales in it: the metadata of its {CARD_FILE} has no entry '{METADATA_KEY}'.")
    return scales if model is None else scales.for_model(model)


def default_scales(model_name: str) -> Scales:
    """Loads the scales in the repository of a model, or else in what ships for its name, and says how to get some."""
    with explaining(f"'{model_name}' is not the name of a model"):
        place, path = parse_model_name(model_name)
    if place is not None:
        return load_scales(HUB_PREFIX + path if place == 'hf-hub' else path)
    name = ModelName.parse(model_name)
    for shipped, folder in shipped_repositories().items():
        # Other weights of the architecture were trained with other scales, or with none.
        fits = shipped == model_name or (not name.tag and ModelName.parse(shipped).architecture == name.architecture)
        if fits and (scales := read_card_scales(folder / CARD_FILE, shipped)):
            return scales
    known = ['FILE', *UNSEARCHED]
    if is_model_pretrained('.'.join(filter(None, (name.of_kind('branches'), name.tag)))):
        known.append(f'{IMPLIED} (by the branches of its weights)')
    if find_published(name.architecture):
        known.append(PUBLISHED)
    raise ValueError(
        f'{model_name} has no scales, and none ship for it. Search some with --model {name.of_kind("hs")} (or '
        f'--search-first), or name some: --scales {" or --scales ".join(known)}.'
    )


def resource_dir(name: str) -> Path:
    """Returns `configs` or `pretrained`: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return package / name if (package / name).is_dir() else package.parent / name


def shipped_repositories() -> dict[str, Path]:
    """Returns the folders `pretrained/<model>.<tag>`, each one the content of a Hub repository, by name."""
    folders = sorted(resource_dir('pretrained').glob('*.*/'))
    return {folder.name: folder for folder in folders if (folder / CARD_FILE).is_file()}


def known_scales() -> list[dict[str, Any]]:
    """Lists the scales that ship, that are published, and that the Hub's cache holds.

    `name` is what `load_scales` takes; `dataset` and `license` are None if they are not known.
    """
    cards = [(name, folder / CARD_FILE, 'ships') for name, folder in shipped_repositories().items()]
    cards += [(str(source), card, 'cached') for source, card in cached_files(CARD_FILE)]
    rows: list[dict[str, Any]] = []
    for name, card, where in cards:
        # A cache may hold any kind of card.
        with suppress(OSError, ValueError):
            if scales := read_card_scales(card, name):
                facts = {key: scales.provenance.get(key) for key in ('dataset', 'license')}
                rows.append({'name': name, 'network': scales.architecture, **facts, 'where': where})
    for name, row in published_table().items():
        facts = {'dataset': row.dataset, 'license': row.license}
        where = 'published, cached' if row.is_cached else 'published'
        rows.append({'name': name, 'network': row.network, **facts, 'where': where})
    return rows


def scales_beside_weights(cfg: Mapping[str, Any]) -> Scales | None:
    """Reads the scales of the repository that pretrained weights come from; None if it has no card, or none in it.

    `cfg` is timm's configuration of the weights: `source`, `file`, `hf_hub_id`.
    """
    if cfg.get('file') and cfg.get('source') != 'hf-hub':
        place = Path(cfg['file'])
        card = (place if cfg.get('source') == 'local-dir' else place.parent) / CARD_FILE
        return read_card_scales(card) if card.is_file() else None
    if not cfg.get('hf_hub_id'):
        return None
    try:
        return read_card_scales(*_hub_card(cfg['hf_hub_id']))
    except HubFileNotFoundError:
        return None


def _hub_card(repository: str, token: str | bool | None = None) -> tuple[Path, str, Callable[[str], Path]]:
    """Returns the arguments of `read_card_scales` for a repository on the Hub."""
    hub = parse_hub_source(repository)
    fetch = partial(download, hub.repo_id, revision=hub.revision, token=token)
    return fetch(CARD_FILE), str(hub), fetch
