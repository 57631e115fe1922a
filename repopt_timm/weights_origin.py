"""Where a model's weights come from: their licence, and the weights with branches that they were merged from.

Both stand in the model's `pretrained_cfg`, the second among its `notes`: timm writes them into `config.json` and reads
them from there, so that they survive saving, loading and fine-tuning.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ['forget_origin', 'merged_from', 'note_merged', 'origin_of', 'restore_origin']

_MERGED = 'merged from '
_KEYS = ('license', 'notes')


def origin_of(model: Any) -> dict[str, Any]:
    """Returns what is known of the origin of a timm model's weights, as plain data: `license` and `notes`."""
    cfg = model.pretrained_cfg
    known = {key: cfg[key] for key in _KEYS if cfg.get(key)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}


def restore_origin(model: Any, origin: Mapping[str, Any] | None) -> None:
    """Gives a timm model the origin of the weights that it took over; what it stated before goes.

    Args:
        model: The model.
        origin: What `origin_of` returned. Defaults to none.
    """
    others = {key: value for key, value in model.pretrained_cfg.items() if key not in _KEYS}
    model.pretrained_cfg = {**others, **{key: value for key, value in (origin or {}).items() if key in _KEYS}}


def forget_origin(model: Any) -> None:
    """Removes the licence and notes of weights that timm knows for a model, from one that was not loaded from them."""
    restore_origin(model, None)


def note_merged(model: Any, source: str) -> None:
    """Notes that a timm model's weights were merged from those of branches.

    Args:
        model: The model.
        source: Name of the weights with branches, such as `timm/mobileone_s0.apple_in1k`.
    """
    restore_origin(model, {**origin_of(model), 'notes': [f'{_MERGED}{source}']})


def merged_from(model: Any) -> str:
    """Returns the name of the weights with branches that a timm model's were merged from; empty if there are none."""
    for note in origin_of(model).get('notes', ()):
        if isinstance(note, str) and note.startswith(_MERGED):
            return note.removeprefix(_MERGED)
    return ''
