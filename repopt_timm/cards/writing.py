"""The files that describe scales in a repository: its card, and a picture of the scales."""

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..files import write_text
from ..plot import plot_scales
from ..scales import Scales
from ..weights_origin import license_identifier
from .document import CARD_FILE, beside, read_metadata, results_in, update_card
from .format import METADATA_KEY, SCALES_FILE, decode_scales, encode_scales, has_scales_file
from .licence import checked_license, choose_license, stated_license
from .text import SCALES_PICTURE, WEIGHTS_FILE, model_for, render_body
from .transfer import push_folder

__all__ = ['draw', 'push_scales', 'save_scales_card', 'write_card']

_logger = logging.getLogger(__name__)


def write_card(
    directory: Path,
    repo_id: str | None,
    model_name: str,
    scales: Scales | None,
    results: Sequence[EvalResult] | None = (),
    training: Mapping[str, Any] | None = None,
    published: Collection[str] = (),
    scales_file: bool = False,
    license_name: str = '',
    weights_license: str = '',
) -> None:
    """Writes the card of a directory, and the picture of its scales; what else an existing card says survives.

    Args:
        directory: Folder of the card, and of the files that it describes.
        repo_id: Name that the repository has on the Hub. Defaults to a placeholder with the directory's name.
        model_name: Name of the model in timm.
        scales: The scales. Defaults to what the card has already.
        results: Measured accuracies; None if what the card states is of other weights.
        training: How the weights were trained. Defaults to what the card says already.
        published: Names of further files that the repository has.
        scales_file: Put the vectors into `scales.safetensors` beside the card; a card that has done so goes on.
        license_name: Licence of a card that states none. Defaults to the weights' own, or, without weights, to
            what the provenance of the scales names.
        weights_license: Licence of the weights, as far as known.

    Raises:
        ValueError: If the existing card cannot be read, or could not be carried through unchanged.
    """
    repo_id = repo_id or f'USER/{directory.resolve().name}'
    path = directory / CARD_FILE
    previous = read_metadata(path) if path.is_file() else {}
    published_entry = previous.get(METADATA_KEY)
    # Those of a card whose weights stay as they are.
    shown = results_in(previous, path) if training is None else results or ()
    if scales is None and published_entry is not None:
        scales = decode_scales(published_entry, str(path), partial(beside, path))
    if training is None and isinstance(published_entry, Mapping):
        kept = published_entry.get('training')
        training = kept if isinstance(kept, Mapping) else None
    scales_file = scales is not None and (scales_file or has_scales_file(published_entry))
    files = {file.name for file in directory.iterdir()} | set(published)
    files = files - {SCALES_FILE} | ({SCALES_FILE} if scales_file else set())
    metadata = None
    if scales is not None:
        metadata = encode_scales(scales, training, scales_file)
        if scales_file:
            scales.with_provenance(metadata['provenance']).save(directory / SCALES_FILE)
        drawn = draw(plot_scales, scales, directory / SCALES_PICTURE, scales.title)
        files = files - {SCALES_PICTURE} | ({SCALES_PICTURE} if drawn else set())
    known = weights_license
    if scales is not None and WEIGHTS_FILE not in files:
        known = license_identifier(scales.provenance.get('license'))
    title = repo_id.split('/')[-1]
    license_name = choose_license(title, stated_license(previous), license_name, known)
    body = render_body(repo_id, model_name, files, scales, training, license_name, shown)
    dataset = (training or {}).get('dataset', '') if WEIGHTS_FILE in files else ''
    text = update_card(path, body, title, metadata, results, license_name, dataset)
    write_text(path, text)


def save_scales_card(
    scales: Scales,
    directory: str | os.PathLike,
    repo_id: str | None = None,
    scales_file: bool = False,
    license: str | None = None,
) -> None:
    """Writes a repository of scales without weights: a model card with a picture.

    An existing card keeps its other metadata, and the text outside the marks of this package.

    Args:
        scales: The scales.
        directory: Folder to write.
        repo_id: Name that it has on the Hub, for the snippets in the card.
        scales_file: Put the vectors into `scales.safetensors` beside the card.
        license: Identifier of the licence, such as `mit`, for a card that states none. Defaults to what the provenance
            of the scales names; without one the card states none.

    Raises:
        ValueError: If an existing card cannot be read, or could not be carried through unchanged, or the licence is
            not an identifier.
    """
    directory, license_name = Path(directory), checked_license(license)
    directory.mkdir(parents=True, exist_ok=True)
    model_name = model_for(scales.architecture)
    write_card(directory, repo_id, model_name, scales, scales_file=scales_file, license_name=license_name)


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
        scales_file: Put the vectors into `scales.safetensors` beside the card, as is done when the Hub refuses the card
            as too large.
        license: Identifier of the licence, such as `mit`, for a card that states none. Defaults to what the provenance
            of the scales names; without one the card states none.

    Returns:
        Address of the commit or pull request.

    Raises:
        HubError: If the repository cannot be written to.
        ValueError: If its card cannot be read, or could not be carried through unchanged, or the licence is not an
            identifier.
    """
    # What no card can hold is an error before the repository is made.
    encode_scales(scales)
    license_name = checked_license(license)

    def write(folder: Path, name: str, published: frozenset[str], too_large: bool) -> None:
        write_card(
            folder,
            name,
            model_for(scales.architecture),
            scales,
            published=published,
            scales_file=scales_file or too_large,
            license_name=license_name,
        )

    return push_folder(repo_id, write, commit_message, private, revision, create_pr, token)


def draw(plot: Callable[..., None], content: Any, path: Path, *args: Any) -> bool:
    """Draws a picture of a card, unless matplotlib is not installed; returns whether it did."""
    try:
        plot(content, path, *args)
    except ImportError as error:
        _logger.warning(f'The card has no {path.name}: {error}')
        return False
    return True
