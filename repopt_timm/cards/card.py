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

from ..errors import reason_of, scrub
from ..scales import Scales
from ..weights_origin import license_identifier

CARD_FILE = 'README.md'
SCALES_FILE = 'scales.safetensors'
METADATA_KEY = 'repopt'
METRICS = {'top1': 'Top-1 accuracy', 'top5': 'Top-5 accuracy'}

# hf.co/docs/hub/repositories-licenses; any other is `other`, with a name.
HUB_LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0
cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gemma gfdl gpl
gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1
openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""

_FORMAT = 1
# An order of magnitude above the largest network's: files of a repository may come from anyone.
_MAX_CARD_BYTES = 1 << 22
_MAX_SCALES_BYTES = 1 << 26
_MAX_FACTS = 1 << 18
# timm's prefixes of data sets.
_DATASET_PREFIX = re.compile(r'^(?:hfds|hfids|tfds|torch|wds)/')
# Names appear in snippets that people copy, so they are nothing but names.
_NAME = re.compile(r'[\w.-]{0,200}')


def read_card_scales(
    path: str | os.PathLike, source: str = '', fetch: Callable[[str], Path] | None = None
) -> Scales | None:
    """Reads the scales of a card; None if it has none. Their provenance names its licence, unless it names one.

    Errors call the card `source`. `fetch` returns the path of a file beside the card, by its name.
    """
    source = source or os.fspath(path)
    metadata = read_metadata(path, source)
    if METADATA_KEY not in metadata:
        return None
    scales = decode_scales(metadata[METADATA_KEY], source, fetch or Path(path).parent.joinpath)
    license_name = license_identifier(stated_license(metadata))
    return scales.with_provenance({'license': license_name, **scales.provenance}) if license_name else scales


def read_metadata(path: str | os.PathLike, source: str) -> dict[str, Any]:
    """Reads the metadata of a card, whose entry `repopt`, if there is one, is a mapping of our format."""
    data = _read_at_most(path, _MAX_CARD_BYTES, source)
    try:
        front = REGEX_YAML_BLOCK.search(data.decode('utf-8-sig'))
        metadata = dict(yaml.safe_load(front[2]) or {}) if front else {}
        found = dict(metadata.get(METADATA_KEY, {})).get('format', _FORMAT)
    except Exception as error:
        # On damaged bytes a reader may raise anything.
        raise ValueError(f'{source}: its metadata cannot be read: {reason_of(error)}. Fix the front matter.') from None
    if found != _FORMAT:
        raise ValueError(f"{source}: its '{METADATA_KEY}' is in format {found!r:.20}: upgrade repopt-timm.")
    return metadata


def stated_license(metadata: Mapping[str, Any]) -> str:
    """Returns the licence that the metadata of a card state, by its own name; empty if they state none."""
    stated = metadata.get('license') or ''
    if stated == 'other':
        stated = metadata.get('license_name') or stated
    return ', '.join(map(str, stated)) if isinstance(stated, list) else str(stated)


def checked_license(name: str | None) -> str:
    """Returns the identifier of a licence that somebody gives, in lower case; empty for none."""
    if name and not license_identifier(name):
        raise ValueError(f"The licence is {name!r:.80}, expected an identifier such as 'apache-2.0' or 'my-license'.")
    return license_identifier(name)


def decode_scales(entry: Any, source: str, fetch: Callable[[str], Path]) -> Scales:
    """Decodes the `repopt` entry of a card, which may come from anyone; see `read_card_scales`."""
    try:
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
    """Returns the `repopt` entry of a card without its scales, and these as bytes; refuses what no card can hold."""
    provenance = _plain(scales.provenance, 'provenance')
    for name in (scales.architecture, *scales):
        if not _NAME.fullmatch(name):
            raise ValueError(f'{name!r:.80} is in the scales, expected up to 200 letters, digits, dots and dashes.')
    entry = {
        'format': _FORMAT,
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
    """Turns accuracies into the form in which the Hub shows them; see `save_pretrained` for the argument."""
    values = {name: value for name, value in metrics.items() if name != 'dataset'}
    dataset = metrics.get('dataset', '')
    if not dataset or not all(map(math.isfinite, values.values())):
        raise ValueError(f"The metrics are {dict(metrics)}, expected {{'dataset': NAME}} and finite numbers.")
    return [
        EvalResult(
            task_type='image-classification',
            dataset_type=dataset_id(dataset) or 'unknown',
            dataset_name=dataset,
            metric_type='accuracy' if name in METRICS else name,
            metric_name=METRICS.get(name, name),
            metric_value=value,
        )
        for name, value in values.items()
    ]


def dataset_id(name: str) -> str:
    """Returns the name of a data set as the Hub takes it, `user/name` or a name; empty if no letter of it remains."""
    parts = [
        re.sub(r'[^\w.]+|\.{2,}', '-', part, flags=re.ASCII).strip('-.')[:96]
        for part in _DATASET_PREFIX.sub('', name).split('/')
    ]
    return '/'.join([part for part in parts if part][-2:])


def _plain(facts: Any, where: str) -> dict[str, Any]:
    """Returns facts as plain data without access tokens."""
    text = ''
    try:
        for chunk in json.JSONEncoder(default=str, allow_nan=False).iterencode(dict(facts or {})):
            text += chunk
            # Aliases in YAML may expand a small card to gigabytes.
            if len(text) > _MAX_FACTS:
                raise ValueError(f'expected at most {_MAX_FACTS} characters')
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(f'{where}: {error}.') from None
    return json.loads(scrub(text))


def _read_at_most(path: str | os.PathLike, limit: int, source: str) -> bytes:
    if os.path.getsize(path) > limit:
        raise ValueError(f'{source}: it is refused because it is larger than {limit >> 20} MiB.')
    return Path(path).read_bytes()
