"""The file of a model card: facts and scales in its metadata, and text that this package writes between two marks.

The entry `repopt` of the metadata has

* `format`: 1;
* `architecture` and `fingerprint` of the scales, see `Scales`;
* `provenance`: where the scales come from, as plain data;
* `start`: start of the operators, unless it is `paper`;
* `training`, only beside weights: how these were trained, as plain data;
* `scales`: what `Scales.to_bytes` returns, in base64. In its place `file: scales.safetensors` if the card would be too
  large; the same bytes are then in that file beside it.

An update keeps all other metadata, and all text outside the marks; comments in the metadata are lost.
"""

import base64
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..scales import Scales
from ..tokens import scrub
from ..weights_origin import license_identifier
from .licence import stated_license

__all__ = [
    'CARD_FILE',
    'FORMAT',
    'METADATA_KEY',
    'METRICS',
    'SCALES_FILE',
    'decode_scales',
    'encode_scales',
    'eval_results',
    'read_card_scales',
    'read_metadata',
]

CARD_FILE = 'README.md'
SCALES_FILE = 'scales.safetensors'
METADATA_KEY = 'repopt'
FORMAT = 1
METRICS = {'top1': 'Top-1 accuracy', 'top5': 'Top-5 accuracy'}

# An order of magnitude above the largest network's: files of a repository may come from anyone.
_MAX_CARD_BYTES = 1 << 22
_MAX_SCALES_BYTES = 1 << 26
_MAX_FACTS = 1 << 18
# Names appear in snippets that people copy, so they are nothing but names.
_NAME = re.compile(r'[\w.-]{0,200}')
# An order of magnitude faster than the loader in Python.
_Loader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)


def read_card_scales(
    path: str | os.PathLike, source: str = '', fetch: Callable[[str], Path] | None = None
) -> Scales | None:
    """Reads the scales of a card; their provenance names the card's licence, unless it names one already.

    Args:
        path: The file, a `README.md`.
        source: What to call it in errors. Defaults to its path.
        fetch: Returns the path of a file beside the card, by its name. Defaults to the card's folder.

    Returns:
        The scales; None if the card has none.

    Raises:
        OSError: If there is no such file, or its scales are in a file that is not there.
        ValueError: If the card cannot be read, or its scales are damaged.
    """
    source = source or os.fspath(path)
    metadata = read_metadata(path, source)
    if METADATA_KEY not in metadata:
        return None
    scales = decode_scales(metadata[METADATA_KEY], source, fetch or (lambda name: Path(path).parent / name))
    license_name = license_identifier(stated_license(metadata))
    return scales.with_provenance({'license': license_name, **scales.provenance}) if license_name else scales


def read_metadata(path: str | os.PathLike, source: str | None = None) -> dict[str, Any]:
    """Reads the metadata of a card, unchecked; none if it has no front matter.

    Raises:
        OSError: If the file does not exist.
        ValueError: If it is too large, or its front matter cannot be read.
    """
    source = source or os.fspath(path)
    try:
        front = REGEX_YAML_BLOCK.search(_read_at_most(path, _MAX_CARD_BYTES, source).decode('utf-8-sig'))
        metadata = yaml.load(front[2], _Loader) if front else None
    except (yaml.YAMLError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        # A tag that does not suit its value is an error of any kind.
        problem = ' '.join(scrub(str(error)).split())[:500]
        raise ValueError(f'{source}: its metadata cannot be read: {problem}. Mend the front matter.') from None
    if not isinstance(metadata, dict | None):
        raise ValueError(f'{source}: its metadata should be a mapping. Mend the front matter.')
    return metadata or {}


def decode_scales(entry: Any, source: str, fetch: Callable[[str], Path]) -> Scales:
    """Decodes the `repopt` entry of a card, which may come from anyone; see `read_card_scales`.

    Raises:
        OSError: If the scales are in a file that is not there.
        ValueError: If the entry is of another format, damaged, or does not match its fingerprint.
    """
    try:
        if entry['format'] != FORMAT:
            raise ValueError(f'it is in format {entry["format"]!r:.20}, but this package reads {FORMAT}: upgrade it')
        if 'file' in entry:
            # Never a name of the card's choice, which could lead anywhere.
            data = _read_at_most(fetch(SCALES_FILE), _MAX_SCALES_BYTES, SCALES_FILE)
        else:
            data = base64.b64decode(entry['scales'], validate=True)
        scales = Scales.from_bytes(data, source)
        scales.check_fingerprint(entry['fingerprint'])
        return scales.with_provenance(_plain(entry['provenance'], 'provenance'), source)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: the entry '{METADATA_KEY}' of its metadata cannot be read: {error}.") from None


def encode_scales(scales: Scales, training: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], bytes]:
    """Returns the `repopt` entry of a card without its scales, and these as bytes.

    Raises:
        ValueError: If a fact is not plain data, or a name could not stand in a snippet.
    """
    provenance = _plain(scales.provenance, 'provenance')
    for name in (scales.architecture, *scales):
        if not _NAME.fullmatch(name):
            raise ValueError(f'{name!r:.80} is in the scales, expected up to 200 letters, digits, dots and dashes.')
    entry = {
        'format': FORMAT,
        'architecture': scales.architecture,
        'fingerprint': scales.fingerprint,
        'provenance': provenance,
    }
    if scales.start != 'paper':
        entry['start'] = scales.start
    if training:
        entry['training'] = _plain(training, 'training')
    data = scales.with_provenance(provenance).to_bytes()
    # safetensors writes its metadata in a random order. Sorted, the same scales make the same card.
    size = int.from_bytes(data[:8], 'little')
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True).encode()
    header += b' ' * (-len(header) % 8)
    return entry, len(header).to_bytes(8, 'little') + header + data[8 + size :]


def eval_results(metrics: Mapping[str, Any]) -> list[EvalResult]:
    """Turns accuracies into the form in which the Hub shows them.

    Args:
        metrics: `dataset`, its name, and the results: `top1` and `top5` in percent, or others under names of their own.

    Raises:
        ValueError: If the dataset is missing, or a result is not a finite number.
    """
    values = dict(metrics)
    dataset = values.pop('dataset', '')
    if not dataset:
        raise ValueError("No dataset is named. Give it along: {'dataset': 'cifar10', 'top1': 93.1}.")
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"'{name}' is {value}, expected a finite number.")
    return [
        EvalResult(
            task_type='image-classification',
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type='accuracy' if name in METRICS else name,
            metric_name=METRICS.get(name, name),
            metric_value=value,
        )
        for name, value in values.items()
    ]


def _plain(facts: Any, where: str) -> dict[str, Any]:
    """Returns facts as plain data without access tokens.

    Raises:
        ValueError: If they are not, or too many: aliases in YAML may expand a small card to gigabytes.
    """
    text = ''
    try:
        for chunk in json.JSONEncoder(default=str, allow_nan=False).iterencode(dict(facts or {})):
            text += chunk
            if len(text) > _MAX_FACTS:
                raise ValueError(f'expected at most {_MAX_FACTS} characters')
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(f'{where}: {error}.') from None
    return json.loads(scrub(text))


def _read_at_most(path: str | os.PathLike, limit: int, source: str) -> bytes:
    with open(path, 'rb') as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f'{source}: it is refused, as it is larger than {limit} bytes.')
    return data
