"""Where a model's weights come from: their licence, and the weights with branches that they were merged from.

Both are in the model's `pretrained_cfg`, the second among its `notes`: timm writes them into `config.json` and reads
them from there, so that they survive saving, loading and fine-tuning.
"""

import re
from collections.abc import Mapping
from typing import Any

_MERGED = 'merged from '


def origin_of(model: Any) -> dict[str, Any]:
    """Returns what is known of the origin of a timm model's weights, as plain data: `license` and `notes`."""
    return _checked(getattr(model, 'pretrained_cfg', None))


def restore_origin(model: Any, origin: Any) -> None:
    """Replaces the licence and notes of a timm model by what `origin_of` returned; anything else removes them."""
    others = {key: value for key, value in model.pretrained_cfg.items() if key not in ('license', 'notes')}
    model.pretrained_cfg = {**others, **_checked(origin)}


def note_merged(model: Any, source: str) -> None:
    """Notes that a timm model's weights were merged from weights with branches, by the name of these."""
    origin = origin_of(model)
    others = [note for note in origin.get('notes', ()) if not note.startswith(_MERGED)]
    restore_origin(model, {**origin, 'notes': [f'{_MERGED}{source}', *others]})


def merged_from(model: Any) -> str:
    """Returns the name of the weights with branches that a timm model's were merged from; empty if there are none."""
    notes = origin_of(model).get('notes', ())
    return next((note.removeprefix(_MERGED) for note in notes if note.startswith(_MERGED)), '')


def license_identifier(name: Any) -> str:
    """Returns the identifier of a licence in lower case; empty if it is not a valid one."""
    return name.lower() if isinstance(name, str) and re.fullmatch(r'[a-z0-9][a-z0-9.+_-]{0,99}', name.lower()) else ''


def _checked(origin: Any) -> dict[str, Any]:
    """Returns the well-formed parts of an origin, which may come from anyone's file and goes into a card."""
    origin = origin if isinstance(origin, Mapping) else {}
    notes = origin.get('notes')
    notes = [notes] if isinstance(notes, str) else notes if isinstance(notes, list | tuple) else []
    notes = [note for note in notes if isinstance(note, str)]
    known = {'license': license_identifier(origin.get('license')), 'notes': notes}
    return {key: value for key, value in known.items() if value}
