"""How scales are written in the metadata of a model card (the README.md of a Hub repository).

Format version 2: the card's YAML front matter has a key `repopt` with

* `format`: 2;
* `architecture`, `fingerprint` (see `Scales.fingerprint`), `provenance` (plain data);
* `modules`: for each convolution, in the order of the network, `branches` (their names, sorted), `counts` (name to
  count, without those of 1; not there if empty), `geometry` (`str(Geometry)`, such as
  `64 -> 128 channels, 3x3, stride 2x2, groups 1`; not there if unknown),
  `channels` (without a geometry) and `data`: the branches' vectors one after the other as little-endian
  float32, whose bytes are sorted by significance (all lowest bytes first), compressed by zlib, in base64;
* `training`, only beside weights: how these were trained (plain data).

Format version 3, for a card that the Hub would refuse as too large: `file`, always `scales.safetensors`, in the place
of `modules`. That file, beside the card, is one of `Scales.save`; fingerprint and provenance are the card's.
"""

import base64
import binascii
import json
import math
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..reparam import Geometry
from ..scales import Scales, read_scale_file
from ..tokens import scrub

__all__ = [
    'METADATA_KEY',
    'SCALES_FILE',
    'check_version',
    'decode_scales',
    'encode_scales',
    'has_scales_file',
    'kind_of_value',
]

METADATA_KEY = 'repopt'
SCALES_FILE = 'scales.safetensors'

_FORMAT_VERSION = 2
_FILE_VERSION = 3
# An order of magnitude above L2 with 48 modules and 69 thousand values; a card may come from anyone.
_MAX_MODULES = 1000
_MAX_BRANCHES = 16
_MAX_VALUES = 1 << 20
_MAX_NESTING = 32
# Names appear in snippets that people copy, so they are nothing but names.
_NAME = re.compile(r'[\w.-]{1,200}')


def encode_scales(
    scales: Scales, training: Mapping[str, Any] | None = None, scales_file: bool = False
) -> dict[str, Any]:
    """Returns the `repopt` entry of a card as plain data; see the module's docstring for the format.

    Args:
        scales: The scales.
        training: How the weights beside them were trained.
        scales_file: Name the file beside the card instead of holding the vectors.

    Raises:
        ValueError: If a name or a size is beyond what `decode_scales` takes.
    """
    geometry, counts = scales.geometry, scales.counts
    metadata = {
        'format': _FORMAT_VERSION,
        'architecture': scales.architecture,
        'fingerprint': scales.fingerprint,
        'provenance': _without_tokens(scales.provenance),
        'modules': {name: _encode_module(scales[name], geometry.get(name), counts[name]) for name in scales},
    }
    if training:
        metadata['training'] = _without_tokens(training)
    # What no reader would take is an error now, not when somebody reads it.
    decode_scales(metadata, 'The scales')
    if scales_file:
        del metadata['modules']
        metadata |= {'format': _FILE_VERSION, 'file': SCALES_FILE}
    return metadata


def has_scales_file(metadata: object) -> bool:
    """Returns whether the `repopt` entry of a card says that its scales are in the file beside it."""
    return isinstance(metadata, Mapping) and metadata.get('file') == SCALES_FILE


def decode_scales(metadata: object, source: str, fetch: Callable[[str], Path] | None = None) -> Scales:
    """Decodes the `repopt` entry of a card, which may come from anyone: nothing large is made before it is checked.

    Args:
        metadata: Value of the key.
        source: Card that it comes from, for errors.
        fetch: Returns where the file of this name beside the card is.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the entry is of another version, not in the format, larger than any network needs, or does not
            match its fingerprint.
    """
    where = f"{source}: '{METADATA_KEY}'"
    if not isinstance(metadata, Mapping):
        raise ValueError(f'{where} is {kind_of_value(metadata)}, expected a mapping with the scales.')
    version = _field(metadata, 'format', int, where)
    check_version(version, where)
    provenance = _field(metadata, 'provenance', Mapping, where)
    _check_plain(provenance, f'{where}: provenance')
    _check_plain(metadata.get('training'), f'{where}: training')
    architecture = _field(metadata, 'architecture', str, where)
    fingerprint = _name(_field(metadata, 'fingerprint', str, where), f'{where}: fingerprint')
    if version == _FILE_VERSION:
        scales = read_scale_file(_beside(metadata, where, fetch)).with_provenance(provenance, source)
        scales.check_fingerprint(fingerprint)
        return scales
    modules, geometry, counts = _decode_modules(_field(metadata, 'modules', Mapping, where), where)
    scales = Scales(
        _name(architecture, f'{where}: architecture') if architecture else '',
        modules,
        geometry,
        counts,
        provenance,
        source,
    )
    scales.check_fingerprint(fingerprint)
    return scales


def _beside(metadata: Mapping[Any, Any], where: str, fetch: Callable[[str], Path] | None) -> Path:
    # Never a name of the card's own choice, which could lead anywhere.
    if not has_scales_file(metadata):
        raise ValueError(f"{where}: its 'file' is not {SCALES_FILE}. The card is damaged or forged.")
    if fetch is None:
        raise ValueError(f'{where} says that the scales are in {SCALES_FILE} beside the card: get both.')
    return fetch(SCALES_FILE)


def check_version(version: int, where: str) -> None:
    """Checks that this package can read an entry of a version.

    Raises:
        ValueError: If it cannot; says what to do.
    """
    if version not in (_FORMAT_VERSION, _FILE_VERSION):
        advice = 'upgrade repopt-timm (pip install -U repopt-timm)'
        if version < _FORMAT_VERSION:
            advice = 'publish the scales again, from the checkpoint of their search'
        raise ValueError(
            f'{where} is in version {version} of its format, this package reads versions {_FORMAT_VERSION} and '
            f'{_FILE_VERSION}: {advice}.'
        )


def _check_plain(value: object, where: str, depth: int = 0) -> None:
    """Checks that a value is what YAML and JSON both can hold: text, numbers, lists and mappings with text as keys.

    Raises:
        ValueError: If it is not; names where.
    """
    if depth > _MAX_NESTING:
        raise ValueError(f'{where} is nested more than {_MAX_NESTING} levels deep.')
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f'{where} has {kind_of_value(key)} as a key, expected text: put it in quotes.')
            _check_plain(item, f'{where}.{key[:200]}', depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_plain(item, where, depth + 1)
    elif value is not None and not isinstance(value, str | int | float):
        raise ValueError(f'{where} is {kind_of_value(value)}, expected text or a number: put it in quotes.')
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'{where} is {value}, expected a finite number.')


def _encode_module(
    vectors: Mapping[str, Tensor], geometry: Geometry | None, counts: Mapping[str, int]
) -> dict[str, Any]:
    branches = sorted(vectors)
    stacked = np.stack([vectors[branch].numpy() for branch in branches]).astype('<f4')
    planes = stacked.reshape(-1).view(np.uint8).reshape(-1, 4).T
    module: dict[str, Any] = {'branches': branches}
    if several := {branch: count for branch, count in sorted(counts.items()) if count > 1}:
        module['counts'] = several
    if geometry is None:
        module['channels'] = stacked.shape[1]
    else:
        module['geometry'] = str(geometry)
    module['data'] = base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()
    return module


def _decode_modules(
    modules: Mapping[object, object], where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Geometry], dict[str, dict[str, int]]]:
    if len(modules) > _MAX_MODULES:
        raise ValueError(f'{where}: {len(modules)} modules are refused, expected at most {_MAX_MODULES}.')
    decoded: dict[str, dict[str, Tensor]] = {}
    geometry: dict[str, Geometry] = {}
    counts: dict[str, dict[str, int]] = {}
    left = _MAX_VALUES
    for name, content in modules.items():
        # A network that is one convolution has it under no name.
        module = '' if name == '' else _name(name, f'{where}: name of a module')
        here = f"{where}: module '{module}'"
        if not isinstance(content, Mapping):
            raise ValueError(f'{here} is {kind_of_value(content)}, expected a mapping of geometry, branches and data.')
        if 'geometry' in content:
            geometry[module] = _parse_geometry(_field(content, 'geometry', str, here), here)
        channels = geometry[module].out_channels if module in geometry else _field(content, 'channels', int, here)
        branches = _branch_names(content, channels, here)
        left -= channels * len(branches)
        if left < 0:
            raise ValueError(f'{here}: more than {_MAX_VALUES} values in the card are refused; no network needs them.')
        values = _unpack(_field(content, 'data', str, here), channels * len(branches), here)
        decoded[module] = dict(zip(branches, torch.from_numpy(values.reshape(len(branches), channels)).unbind()))
        counts[module] = _decode_counts(content, here)
    return decoded, geometry, counts


def _parse_geometry(text: str, where: str) -> Geometry:
    try:
        return Geometry.parse(text)
    except ValueError as error:
        raise ValueError(f'{where}: {error} The card is damaged.') from None


def _decode_counts(content: Mapping[Any, Any], where: str) -> dict[str, int]:
    counts = _field(content, 'counts', Mapping, where) if 'counts' in content else {}
    if len(counts) > _MAX_BRANCHES:
        raise ValueError(f'{where}: {len(counts)} counts are refused, expected at most {_MAX_BRANCHES}.')
    return {_name(name, f'{where}: name of a branch'): _field(counts, name, int, where) for name in counts}


def _branch_names(content: Mapping[object, object], channels: int, where: str) -> list[str]:
    branches = _field(content, 'branches', list, where)
    if not 0 < channels <= _MAX_VALUES:
        raise ValueError(f'{where}: {channels} channels are refused, expected 1 to {_MAX_VALUES}.')
    if not 0 < len(branches) <= _MAX_BRANCHES:
        raise ValueError(f'{where}: {len(branches)} branches are refused, expected 1 to {_MAX_BRANCHES}.')
    names = [_name(branch, f'{where}: name of a branch') for branch in branches]
    if names != sorted(set(names)):
        raise ValueError(f'{where}: the branches {names} are not sorted, or not different.')
    return names


def _unpack(data: str, count: int, where: str) -> np.ndarray:
    size = 4 * count
    try:
        packed = base64.b64decode(data, validate=True)
        unpacker = zlib.decompressobj()
        # One byte more than declared is enough to know that it is too long.
        content = unpacker.decompress(packed, size + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise ValueError(f'{where}: its data is not a zlib stream in base64: {error}. The card is damaged.') from None
    if len(content) != size or not unpacker.eof or unpacker.unused_data:
        found = f'more than {size}' if len(content) > size else str(len(content))
        raise ValueError(
            f'{where}: its data unpacks to {found} bytes, expected {size} ({count} values of float32, as its channels '
            f'and branches say). The card is damaged or forged; get it again.'
        )
    planes = np.frombuffer(content, np.uint8).reshape(4, count)
    return np.ascontiguousarray(planes.T).view('<f4').reshape(-1).astype(np.float32)


def _without_tokens(value: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(scrub(json.dumps(dict(value), default=str)))


def _field(metadata: Mapping[Any, object], key: str, kind: type, where: str) -> Any:
    if key not in metadata:
        raise ValueError(f"{where} has no '{key}'. The card is damaged, or not one of repopt-timm.")
    value = metadata[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {int: 'an integer', str: 'text', list: 'a list', Mapping: 'a mapping'}
        raise ValueError(f"{where}: '{key}' is {kind_of_value(value)}, expected {names[kind]}.")
    return value


def _name(value: object, where: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(
            f'{where}: found {kind_of_value(value)}, expected up to 200 letters, digits, dots, dashes, underscores.'
        )
    return value


def kind_of_value(value: object) -> str:
    """Describes a value in a message, never by the value itself: it may be of any size."""
    if isinstance(value, str):
        return f'text of {len(value)} characters'
    return 'nothing' if value is None else f'a value of type {type(value).__name__}'
