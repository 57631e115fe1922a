"""Model cards (the README.md of a Hub repository) that hold scales in their metadata.

Format version 1: the card's YAML front matter has a key `repopt` with

* `format`: 1;
* `architecture`, `strides` (five integers), `fingerprint` (see `Scales.fingerprint`), `provenance` (plain data);
* `modules`: for each convolution `channels`, `branches` (their names, sorted) and `data`: the branches' vectors one
  after the other as little-endian float32, compressed by zlib, in base64;
* `training`, only beside weights: how these were trained (plain data).

Text that this package writes for people stands between two comments, `BEGIN` and `END`. An update replaces what is
between them and nothing else of the body; a card without them gets both, and what is between them, after its own text.
Comments inside the front matter are lost in an update.
"""

import base64
import binascii
import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from torch import Tensor

from ..tokens import scrub

__all__ = [
    'BEGIN',
    'CARD_FILE',
    'END',
    'METADATA_KEY',
    'CardEntry',
    'decode_entry',
    'encode_entry',
    'eval_results',
    'read_entry',
    'read_metadata',
    'update_card',
]

CARD_FILE = 'README.md'
METADATA_KEY = 'repopt'
BEGIN = '<!-- repopt-timm: begin. Text up to the end mark is rewritten with the scales; write yours outside of it. -->'
END = '<!-- repopt-timm: end -->'

_FORMAT_VERSION = 1
# An order of magnitude above L2 with 48 modules and 69 thousand values; a card may come from anyone.
_MAX_CARD_BYTES = 1 << 23
_MAX_MODULES = 1000
_MAX_BRANCHES = 16
_MAX_VALUES = 1 << 20
_MAX_NESTING = 32
# Names appear in snippets that people copy, so they are nothing but names.
_NAME = re.compile(r'[\w.-]{1,200}')

_METRICS = {'top1': 'Top-1 accuracy', 'top5': 'Top-5 accuracy'}


@dataclass(frozen=True)
class CardEntry:
    """What the `repopt` entry of a card says, decoded; its fingerprint is not checked yet."""

    architecture: str
    strides: tuple[int, ...]
    modules: Mapping[str, Mapping[str, Tensor]]
    fingerprint: str
    provenance: Mapping[str, Any]


def encode_entry(entry: CardEntry, training: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the `repopt` entry of a card as plain data; see the module's docstring for the format.

    Args:
        entry: The scales.
        training: How the weights beside them were trained.

    Raises:
        ValueError: If a name or a size is beyond what `decode_entry` takes.
    """
    metadata = {
        'format': _FORMAT_VERSION,
        'architecture': entry.architecture,
        'strides': list(entry.strides),
        'fingerprint': entry.fingerprint,
        'provenance': _without_tokens(entry.provenance),
        'modules': {module: _encode_vectors(vectors) for module, vectors in entry.modules.items()},
    }
    if training:
        metadata['training'] = _without_tokens(training)
    # A name or a size that no reader would take is told now, and not by the reader.
    decode_entry(metadata, 'The scales')
    return metadata


def decode_entry(metadata: object, source: str) -> CardEntry:
    """Decodes the `repopt` entry of a card, which may come from anyone: nothing large is made before it is checked.

    Args:
        metadata: Value of the key.
        source: Card that it comes from, for errors.

    Raises:
        ValueError: If the entry is newer than this package, not in the format, or larger than any network needs.
    """
    where = f"{source}: '{METADATA_KEY}'"
    if not isinstance(metadata, Mapping):
        raise ValueError(f'{where} is {_kind(metadata)}, expected a mapping with the scales.')
    _check_version(_field(metadata, 'format', int, where), where)
    strides = _field(metadata, 'strides', list, where)
    if len(strides) > _MAX_BRANCHES or not all(type(stride) is int for stride in strides):
        raise ValueError(f'{where}: strides are no short list of integers.')
    provenance = _field(metadata, 'provenance', Mapping, where)
    _check_plain(provenance, f'{where}: provenance')
    return CardEntry(
        architecture=_name(_field(metadata, 'architecture', str, where), f'{where}: architecture'),
        strides=tuple(strides),
        modules=_decode_modules(_field(metadata, 'modules', Mapping, where), where),
        fingerprint=_name(_field(metadata, 'fingerprint', str, where), f'{where}: fingerprint'),
        provenance=provenance,
    )


def read_entry(path: str | os.PathLike, source: str | None = None) -> CardEntry:
    """Reads the scales of a card.

    Args:
        path: The file, a `README.md`.
        source: What to call it in errors; its path when left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the card cannot be read, or holds no scales.
    """
    source = source or os.fspath(path)
    metadata = read_metadata(path, source)
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{source}: no scales in it: its metadata has no key '{METADATA_KEY}'. Publish some with "
            f'Scales.push_to_hub, or name another source.'
        )
    return decode_entry(metadata[METADATA_KEY], source)


def read_metadata(path: str | os.PathLike, source: str | None = None) -> dict[str, Any]:
    """Reads the metadata of a card as they are there, unchecked.

    Args:
        path: The file, a `README.md`.
        source: What to call it in errors; its path when left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is too large, or its front matter cannot be read.
    """
    source = source or os.fspath(path)
    # Whatever is wrong with its index of results, the scales can be read.
    return _parse(_read_text(path, source), source, ignore_metadata_errors=True)[1]


def eval_results(metrics: Mapping[str, float | str], source: str = 'metrics') -> list[EvalResult]:
    """Turns accuracies into the form in which the Hub shows them.

    Args:
        metrics: `dataset`, its name, and the results: `top1` and `top5` in percent, or others under names of their own.
        source: What to call them in errors.

    Raises:
        ValueError: If the dataset is missing, or a result is no number.
    """
    dataset = metrics.get('dataset')
    if not isinstance(dataset, str) or not dataset:
        raise ValueError(f"{source}: no dataset is named. Give it along: {{'dataset': 'cifar10', 'top1': 93.1}}.")
    results = []
    for name, value in metrics.items():
        if name == 'dataset':
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{source}: '{name}' is {_kind(value)}, expected a number.")
        results.append(
            EvalResult(
                task_type='image-classification',
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type='accuracy' if name in _METRICS else name,
                metric_name=_METRICS.get(name, name),
                metric_value=value,
            )
        )
    return results


def update_card(
    path: Path,
    body: str,
    model_name: str,
    entry: Mapping[str, Any] | None = None,
    results: Sequence[EvalResult] | None = (),
) -> str:
    """Returns the text of a card with new metadata and a new generated body; whatever else it has survives.

    Args:
        path: The card as it is; there need not be one.
        body: Markdown to put between the two marks.
        model_name: Name of the model in the index of results, where the card has none yet.
        entry: The `repopt` entry; what the card has when left out.
        results: Results that replace those of the same dataset and metric; None drops those of `eval_results`, which
            other weights had.

    Raises:
        ValueError: If the card cannot be read, or the client cannot carry its metadata through unchanged.
    """
    card, original = _parse(_read_text(path, str(path)) if path.is_file() else '', str(path))
    data = cast(ModelCardData, card.data)
    # Several models, or results in a shape of their own, would come out as something else: better not to write at all.
    _check_carried(original, data, path, ignored={'tags'})
    _set_defaults(data)
    if entry is not None:
        published = data.get(METADATA_KEY)
        if isinstance(published, Mapping) and isinstance(published.get('format'), int):
            _check_version(published['format'], f"{path}: '{METADATA_KEY}'")
        data[METADATA_KEY] = dict(entry)
    if results:
        replaced = {_identity(result) for result in results}
        kept = [result for result in data.eval_results or [] if _identity(result) not in replaced]
        data.model_name = data.model_name or model_name
        data.eval_results = [*kept, *results]
    elif results is None and data.eval_results:
        others = [result for result in data.eval_results if result.metric_name not in _METRICS.values()]
        data.eval_results = others or None
    _check_carried(original, data, path, ignored={'tags', 'model-index', METADATA_KEY})
    card.text = _replace_body(card.text, scrub(body), path)
    return card.content


def _identity(result: EvalResult) -> tuple[Any, ...]:
    # The client files results of one task and dataset together, whatever name the dataset has in each.
    return (*result.unique_identifier, result.metric_type, result.metric_name)


def _check_version(version: int, where: str) -> None:
    if version > _FORMAT_VERSION:
        raise ValueError(
            f'{where} is in version {version} of its format, this package reads up to {_FORMAT_VERSION}: upgrade '
            f'repopt-timm (pip install -U repopt-timm).'
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
                raise ValueError(f'{where} has {_kind(key)} as a key, expected text: put it in quotes.')
            _check_plain(item, f'{where}.{key[:200]}', depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_plain(item, where, depth + 1)
    elif value is not None and not isinstance(value, str | int | float):
        raise ValueError(f'{where} is {_kind(value)}, expected text or a number: put it in quotes.')


def _encode_vectors(vectors: Mapping[str, Tensor]) -> dict[str, Any]:
    branches = sorted(vectors)
    stacked = np.stack([vectors[branch].numpy() for branch in branches]).astype('<f4')
    data = base64.b64encode(zlib.compress(stacked.tobytes(), 9)).decode()
    return {'channels': stacked.shape[1], 'branches': branches, 'data': data}


def _decode_modules(modules: Mapping[object, object], where: str) -> dict[str, dict[str, Tensor]]:
    if len(modules) > _MAX_MODULES:
        raise ValueError(f'{where}: {len(modules)} modules are refused, expected at most {_MAX_MODULES}.')
    decoded = {}
    left = _MAX_VALUES
    for name, content in modules.items():
        module = _name(name, f'{where}: name of a module')
        here = f"{where}: module '{module}'"
        if not isinstance(content, Mapping):
            raise ValueError(f'{here} is {_kind(content)}, expected a mapping of channels, branches and data.')
        channels, branches = _declared_size(content, here)
        left -= channels * len(branches)
        if left < 0:
            raise ValueError(f'{here}: more than {_MAX_VALUES} values in the card are refused; no network needs them.')
        values = _unpack(_field(content, 'data', str, here), channels * len(branches), here)
        decoded[module] = dict(zip(branches, torch.from_numpy(values.reshape(len(branches), channels)).unbind()))
    return decoded


def _declared_size(content: Mapping[object, object], where: str) -> tuple[int, list[str]]:
    channels = _field(content, 'channels', int, where)
    branches = _field(content, 'branches', list, where)
    if not 0 < channels <= _MAX_VALUES:
        raise ValueError(f'{where}: {channels} channels are refused, expected 1 to {_MAX_VALUES}.')
    if not 0 < len(branches) <= _MAX_BRANCHES:
        raise ValueError(f'{where}: {len(branches)} branches are refused, expected 1 to {_MAX_BRANCHES}.')
    names = [_name(branch, f'{where}: name of a branch') for branch in branches]
    if names != sorted(set(names)):
        raise ValueError(f'{where}: the branches {names} are not sorted, or not different.')
    return channels, names


def _unpack(data: str, count: int, where: str) -> np.ndarray:
    size = 4 * count
    try:
        packed = base64.b64decode(data, validate=True)
        unpacker = zlib.decompressobj()
        # One byte more than declared is enough to know that it is too long.
        content = unpacker.decompress(packed, size + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise ValueError(f'{where}: its data is no zlib stream in base64: {error}. The card is damaged.') from None
    if len(content) != size or not unpacker.eof or unpacker.unused_data:
        found = f'more than {size}' if len(content) > size else str(len(content))
        raise ValueError(
            f'{where}: its data unpacks to {found} bytes, expected {size} ({count} values of float32, as its channels '
            f'and branches say). The card is damaged or forged; get it again.'
        )
    return np.frombuffer(content, '<f4').astype(np.float32)


def _read_text(path: str | os.PathLike, source: str) -> str:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no model card '{path}'.")
    size = path.stat().st_size
    if size > _MAX_CARD_BYTES:
        raise ValueError(f'{source}: a card of {size} bytes is refused, expected at most {_MAX_CARD_BYTES}.')
    try:
        return path.read_bytes().decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{source}: the card is no UTF-8 text: {error}. Save it as UTF-8.') from None


def _parse(text: str, source: str, ignore_metadata_errors: bool = False) -> tuple[ModelCard, dict[str, Any]]:
    """Returns a card, and its metadata as they are before the client puts them in its own form."""
    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        # The client warns about a card without metadata.
        text = f'---\n\n---\n{text}'
    metadata = match[2] if match else ''
    try:
        problem = _refused_feature(metadata)
        if problem is None:
            return ModelCard(text, ignore_metadata_errors), yaml.safe_load(metadata) or {}
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        problem = ' '.join(scrub(str(error)).split())[:500]
    raise ValueError(f'{source}: its metadata cannot be read: {problem}. Mend the front matter of the card.')


def _refused_feature(text: str) -> str | None:
    # A few aliases of aliases expand to gigabytes, and deep nesting to a stack overflow; the events show both at once.
    depth = 0
    for event in yaml.parse(text, getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            return 'it uses a YAML alias, which is refused'
        if depth > _MAX_NESTING:
            return f'it is nested more than {_MAX_NESTING} levels deep, which is refused'
    return None


def _check_carried(original: Mapping[str, Any], data: ModelCardData, path: Path, ignored: set[str]) -> None:
    written = data.to_dict()
    for key, value in original.items():
        if key not in ignored and written.get(key) != value:
            raise ValueError(
                f"{path}: its metadata '{key}' would not survive: huggingface_hub's ModelCard reads one model with "
                f'results in the documented form, and would write something else back. The card is left as it was; '
                f"mend '{key}' in it first."
            )


def _set_defaults(data: ModelCardData) -> None:
    data.license = data.license or 'apache-2.0'
    data.library_name = data.library_name or 'timm'
    data.pipeline_tag = data.pipeline_tag or 'image-classification'
    tags = data.tags or []
    data.tags = [*tags, *(tag for tag in ('image-classification', 'timm', 'repopt') if tag not in tags)]


def _replace_body(text: str, body: str, path: Path) -> str:
    block = f'{BEGIN}\n{body.strip()}\n{END}'
    begins, ends = text.count(BEGIN), text.count(END)
    if begins == ends == 0:
        before = text.rstrip()
        return f'{before}\n\n{block}\n' if before else f'\n{block}\n'
    match = re.search(f'{re.escape(BEGIN)}.*?{re.escape(END)}', text, re.DOTALL)
    if match is None or begins != 1 or ends != 1:
        raise ValueError(
            f'{path}: expected one begin mark of repopt-timm and one end mark after it, found {begins} and {ends}. '
            f'Delete the marks in it, and what lies between, then try again.'
        )
    return text[: match.start()] + block + text[match.end() :]


def _without_tokens(value: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(scrub(json.dumps(dict(value), default=str)))


def _field(metadata: Mapping[Any, object], key: str, kind: type, where: str) -> Any:
    if key not in metadata:
        raise ValueError(f"{where} has no '{key}'. The card is damaged, or not one of repopt-timm.")
    value = metadata[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {int: 'an integer', str: 'text', list: 'a list', Mapping: 'a mapping'}
        raise ValueError(f"{where}: '{key}' is {_kind(value)}, expected {names[kind]}.")
    return value


def _name(value: object, where: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(
            f'{where}: found {_kind(value)}, expected up to 200 letters, digits, dots, dashes, underscores.'
        )
    return value


def _kind(value: object) -> str:
    # Never the value itself: it may be of any size.
    if isinstance(value, str):
        return f'text of {len(value)} characters'
    return 'nothing' if value is None else f'a value of type {type(value).__name__}'
