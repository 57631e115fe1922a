"""Repositories of scales: a card, and a picture of them, in a folder or on the Hub."""

import base64
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..files import replacing
from ..plot import plot_scales
from ..scales import Scales
from ..weights_origin import license_identifier
from .card import (
    CARD_FILE,
    METADATA_KEY,
    SCALES_FILE,
    decode_scales,
    encode_scales,
    read_metadata,
    update_card,
)
from .hub import push_folder
from .licence import checked_license, choose_license, stated_license
from .text import SCALES_PICTURE, WEIGHTS_FILE, model_for, render_body

__all__ = ['draw', 'push_scales', 'save_scales_card', 'write_card']

_logger = logging.getLogger(__name__)

# A card that is half as large as one that is still read.
_LARGE = 1 << 20


def write_card(
    folder: Path,
    repo_id: str,
    published: Collection[str],
    scales_file: bool,
    *,
    model_name: str,
    scales: Scales | None,
    license_name: str = '',
    training: Mapping[str, Any] | None = None,
    results: Sequence[EvalResult] = (),
    weights_license: str = '',
    source: str | os.PathLike = '',
) -> None:
    """Writes the card of a folder, and the picture of its scales; what else an existing card says survives.

    Args:
        folder: Folder of the card, and of the files that it describes.
        repo_id: Name that the repository has on the Hub.
        published: Names of further files that the repository has.
        scales_file: Put the scales into `scales.safetensors` beside the card, as is done if the card has done so.
        model_name: Name of the model in timm.
        scales: The scales. Defaults to what the card has already.
        license_name: Licence of a card that states none. Defaults to the weights' own, or, without weights, to
            what the provenance of the scales names.
        training: How the weights beside it were trained; None if they stay as they are, with what the card says.
        results: Accuracies of these weights.
        weights_license: Licence of the weights, as far as known.
        source: What to call the folder in errors. Defaults to `repo_id`.

    Raises:
        ValueError: If the existing card cannot be read, or could not be carried through unchanged.
    """
    path, where = folder / CARD_FILE, f'{source or repo_id}/{CARD_FILE}'
    before = read_metadata(path, where) if path.is_file() else {}
    found = before.get(METADATA_KEY)
    if scales is None and found is not None:
        scales = decode_scales(found, where, lambda name: folder / name)
    found = found if isinstance(found, Mapping) else {}
    new_weights = training is not None
    training = training if new_weights else found.get('training')
    files = ({file.name for file in folder.iterdir()} | set(published)) - {SCALES_FILE}
    entry, known = None, weights_license
    if scales is not None:
        entry, data = encode_scales(scales, training)
        training = entry.get('training')
        if scales_file or 'file' in found or len(data) > _LARGE:
            files.add(SCALES_FILE)
            entry['file'] = SCALES_FILE
            with replacing(folder / SCALES_FILE) as temporary:
                temporary.write_bytes(data)
        else:
            entry['scales'] = base64.b64encode(data).decode()
        files -= {SCALES_PICTURE}
        if draw(plot_scales, scales, folder / SCALES_PICTURE, scales.title):
            files.add(SCALES_PICTURE)
        if WEIGHTS_FILE not in files:
            known = license_identifier(scales.provenance.get('license'))
    title = repo_id.split('/')[-1]
    license_name = choose_license(title, stated_license(before), license_name, known)
    dataset = (training or {}).get('dataset', '') if WEIGHTS_FILE in files else ''
    render = partial(render_body, repo_id, model_name, files, scales, training, license_name)
    update_card(path, where, title, render, entry, results if new_weights else None, license_name, dataset)


def save_scales_card(
    scales: Scales,
    directory: str | os.PathLike,
    repo_id: str | None = None,
    scales_file: bool = False,
    license: str | None = None,
) -> None:
    """Writes a folder with a model card that holds scales; what it has already stays.

    Args:
        scales: The scales.
        directory: The folder.
        repo_id: Name that the repository has on the Hub, for the snippets in the card.
        scales_file: Put the scales into `scales.safetensors` beside the card.
        license: See `push_scales`.

    Raises:
        ValueError: If an existing card cannot be read, or could not be carried through unchanged, or the licence is
            not an identifier.
    """
    folder, write = Path(directory), _writer(scales, license)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, repo_id or f'USER/{folder.resolve().name}', (), scales_file, source=folder)


def push_scales(
    scales: Scales,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str = 'Scales of repopt-timm',
    scales_file: bool = False,
    license: str | None = None,
) -> str:
    """Publishes scales on the Hugging Face Hub; weights that the repository has stay as they are.

    Args:
        scales: The scales.
        repo_id: Name of the repository, `user/repo`, made if there is none.
        private: Whether a new repository is private.
        revision: Branch to commit to, made if there is none.
        create_pr: Open a pull request instead of changing the branch.
        token: Defaults to the token of `hf auth login`.
        commit_message: Title of the commit.
        scales_file: Put the scales into `scales.safetensors`, as is done when the Hub refuses the card as too large.
        license: Identifier of the licence, such as `mit`, for a card that states none. Defaults to what the provenance
            of the scales names; without one the card states none.

    Returns:
        Address of the commit or pull request.

    Raises:
        HubError: If the repository cannot be written to.
        ValueError: See `save_scales_card`.
    """
    write = _writer(scales, license)
    return push_folder(repo_id, write, commit_message, private, revision, create_pr, token, scales_file)


def draw(plot: Callable[..., None], content: Any, path: Path, *args: Any) -> bool:
    """Draws a picture of a card, unless matplotlib is not installed; returns whether it did."""
    try:
        plot(content, path, *args)
    except ImportError as error:
        _logger.warning(f'The card has no {path.name}: {error}')
        return False
    return True


def _writer(scales: Scales, license: str | None) -> Callable[..., None]:
    # What no card can hold is an error before anything is made.
    encode_scales(scales)
    model_name, license_name = model_for(scales.architecture), checked_license(license)
    return partial(write_card, model_name=model_name, scales=scales, license_name=license_name)
