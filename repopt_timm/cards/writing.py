"""The files that describe scales in a repository: its card, and a picture of the scales."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..files import write_text
from ..plot import plot_scales
from .format import CARD_FILE, METADATA_KEY, CardEntry, decode_entry, encode_entry, read_metadata, update_card
from .text import SCALES_PICTURE, render_body

__all__ = ['draw', 'write_card']

_logger = logging.getLogger(__name__)


def write_card(
    directory: Path,
    repo_id: str | None,
    model_name: str,
    entry: CardEntry | None,
    results: Sequence[EvalResult] | None = (),
    training: Mapping[str, Any] | None = None,
    published: Collection[str] = (),
) -> None:
    """Writes the card of a directory, and the picture of its scales; what else an existing card says survives.

    Args:
        directory: Where to; the files that are there are those that the card is about.
        repo_id: Name that the repository has on the Hub; a placeholder with the directory's name when left out.
        model_name: Name of the model in timm.
        entry: The scales; those that the card has already when left out.
        results: Measured accuracies; None if what the card tells is of other weights.
        training: How the weights were trained; what the card says already when left out.
        published: Names of further files that the repository has.

    Raises:
        ValueError: If the existing card cannot be read, or could not be carried through unchanged.
    """
    repo_id = repo_id or f'USER/{directory.resolve().name}'
    path = directory / CARD_FILE
    previous = read_metadata(path) if path.is_file() else {}
    published_entry = previous.get(METADATA_KEY)
    if entry is None and published_entry is not None:
        entry = decode_entry(published_entry, str(path))
    if training is None and isinstance(published_entry, Mapping):
        kept = published_entry.get('training')
        training = kept if isinstance(kept, Mapping) else None
    files = {file.name for file in directory.iterdir()} | set(published)
    metadata = None
    if entry is not None:
        metadata = encode_entry(entry, training)
        title = f'{entry.architecture} ({entry.fingerprint[:8]})'
        drawn = draw(plot_scales, entry.modules, directory / SCALES_PICTURE, title)
        files = files - {SCALES_PICTURE} | ({SCALES_PICTURE} if drawn else set())
    body = render_body(repo_id, model_name, files, entry, training, previous.get('license') or 'apache-2.0')
    write_text(path, update_card(path, body, repo_id.split('/')[-1], metadata, results))


def draw(plot: Callable[..., None], content: Any, path: Path, *args: Any) -> bool:
    """Draws a picture of a card, which goes without where matplotlib is not installed; tells whether it is there."""
    try:
        plot(content, path, *args)
    except ImportError as error:
        _logger.warning(f'The card goes without {path.name}: {error}')
        return False
    return True
