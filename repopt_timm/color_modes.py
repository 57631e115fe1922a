"""Pillow's mode of the images that a model takes.

Where the number of channels does not say it, it stands among the `notes` of the model's `pretrained_cfg`: timm writes
these into `config.json` and reads them from there.
"""

from collections.abc import Mapping
from typing import Any

from .weights_origin import origin_of, restore_origin

__all__ = ['COLOR_MODES', 'color_mode', 'evaluated_mode', 'note_color_mode', 'noted_color_mode']

COLOR_MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}
"""Number of channels to the mode of images, where no other is stated."""

# Channels of the modes whose values are the same from timm's loader, which trains, and from its transforms alone, which
# evaluate. Of `1`, `I` and `F` the first makes bytes and the second does not.
_CHANNELS = {'L': 1, 'LA': 2, 'RGB': 3, 'RGBA': 4, 'CMYK': 4, 'YCbCr': 3, 'LAB': 3, 'HSV': 3}

_NOTE = 'images in the mode '


def color_mode(channels: int, stated: str | None = None) -> str:
    """Returns the mode of a model's images: the stated one, or else what their number of channels implies.

    Raises:
        ValueError: If none is stated, and images cannot have as many channels.
    """
    if stated:
        return stated
    if channels not in COLOR_MODES:
        raise ValueError(f'The model takes {channels} channels, expected 1 to 4, which images can have.')
    return COLOR_MODES[channels]


def evaluated_mode(config: Mapping[str, Any]) -> str:
    """Returns the mode of a model's images, if its evaluation reads from them what its training did.

    Args:
        config: Preprocessing, as `timm.data.resolve_data_config` gives it, and `input_img_mode` where it is stated.

    Raises:
        ValueError: If it does not, or images cannot have as many channels.
    """
    channels = config['input_size'][0]
    mode = color_mode(channels, config.get('input_img_mode'))
    if mode not in _CHANNELS:
        raise ValueError(
            f"The model takes images in the mode '{mode}', expected one of {', '.join(_CHANNELS)}: training and "
            f'evaluation read other values from others. Train it with --input-img-mode {COLOR_MODES.get(channels)}.'
        )
    if _CHANNELS[mode] != channels:
        raise ValueError(
            f"The model takes images in the mode '{mode}', which have {_CHANNELS[mode]} channels, but the input size "
            f'has {channels}: give the one that it was trained with.'
        )
    return mode


def note_color_mode(model: Any, mode: str | None) -> None:
    """Notes the mode of a timm model's images, in place of one that it stated before.

    Args:
        model: The model.
        mode: The mode; None for what their number of channels implies.
    """
    if mode in COLOR_MODES.values():
        mode = None
    if mode == noted_color_mode(model):
        return
    origin = origin_of(model)
    notes = [note for note in origin.get('notes', ()) if not note.startswith(_NOTE)]
    restore_origin(model, {**origin, 'notes': [_NOTE + mode, *notes] if mode else notes})


def noted_color_mode(model: Any) -> str | None:
    """Returns the mode that a timm model notes; None for that of its number of channels."""
    notes = origin_of(model).get('notes', ())
    return next((note.removeprefix(_NOTE) for note in notes if note.startswith(_NOTE)), None)
