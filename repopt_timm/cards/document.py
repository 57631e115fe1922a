"""The file of a model card: metadata in its front matter, and the text that this package writes between two marks.

An update replaces what is between the comments `BEGIN` and `END` and nothing else of the body; a card without them gets
both, and what is between them, after its own text. Comments inside the front matter are lost in an update.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..scales import Scales
from ..tokens import scrub
from ..weights_origin import license_identifier
from .format import METADATA_KEY, check_version, decode_scales, kind_of_value
from .licence import HUB_LICENSES, stated_license

__all__ = [
    'BEGIN',
    'CARD_FILE',
    'END',
    'METRICS',
    'PlainLoader',
    'beside',
    'eval_results',
    'read_card_scales',
    'read_metadata',
    'refused_feature',
    'results_in',
    'update_card',
]

CARD_FILE = 'README.md'
BEGIN = '<!-- repopt-timm: begin. Text up to the end mark is rewritten with the scales; write yours outside of it. -->'
END = '<!-- repopt-timm: end -->'

# An order of magnitude above the largest network's; a card may come from anyone. They hold for what is written too.
_MAX_CARD_BYTES = 1 << 22
_MAX_NESTING = 32
_MAX_NODES = 50_000
# YAML reads 1:2:3 to the base of 60, in a time that grows with the square of the length.
_MAX_NUMBER = 64
_NUMBER = re.compile(r'[-+]?(?:0x[0-9a-fA-F_]+|[0-9._:]+(?:[eE][-+]?[0-9]+)?)')
_NUMBER_TAGS = ('tag:yaml.org,2002:int', 'tag:yaml.org,2002:float')
# Integers that are equal modulo 2**61 - 1 share a hash: a mapping of many takes minutes.
_MAX_NUMERIC_KEY = 18
_MAX_TAG = 100

# The front matter's first and last line, as the Hub sees them.
_FIRST_LINE = re.compile(r'\s*---(?:\r\n|\r|\n)')
_LAST_LINE = re.compile(r'(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)')

# timm's prefixes of datasets; on the Hub only names are known.
_DATASET_TYPE = re.compile(r'(?:hfds|hfids|tfds|torch|wds)/')

METRICS = {'top1': 'Top-1 accuracy', 'top5': 'Top-5 accuracy'}


# libyaml's is an order of magnitude faster.
class PlainLoader(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):  # type: ignore[misc]
    """YAML's own fails on tags that do not suit their values with errors of any kind."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.rpartition(':')[2]
            raise yaml.constructor.ConstructorError(
                None, None, f'a value is not the {kind} that it seems ({error})', node.start_mark
            ) from None


class _Loader(PlainLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        for key, _ in node.value:
            if key.tag in _NUMBER_TAGS and len(key.value) > _MAX_NUMERIC_KEY:
                raise yaml.constructor.ConstructorError(
                    None, None, f'a number of {len(key.value)} characters is a key; quote it', key.start_mark
                )
        return super().construct_mapping(node, deep)


def read_card_scales(
    path: str | os.PathLike, source: str | None = None, fetch: Callable[[str], Path] | None = None
) -> Scales:
    """Reads the scales of a card; their provenance names its licence, unless it names one already.

    Args:
        path: The file, a `README.md`.
        source: What to call it in errors. Defaults to its path.
        fetch: Returns where the file of this name beside the card is. Defaults to the card's folder.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the card cannot be read, holds no scales, or they are damaged.
    """
    source = source or os.fspath(path)
    metadata = read_metadata(path, source)
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{source}: no scales in it: its metadata has no key '{METADATA_KEY}'. Publish some with `repopt-timm "
            f'scales push`, or name another source.'
        )
    scales = decode_scales(metadata[METADATA_KEY], source, fetch or partial(beside, Path(path)))
    license_name = license_identifier(stated_license(metadata))
    return scales.with_provenance({'license': license_name, **scales.provenance}) if license_name else scales


def beside(card: Path, name: str) -> Path:
    """Returns the path of a file in the folder of a card.

    Raises:
        FileNotFoundError: If it is not there.
    """
    path = card.parent / name
    if not path.is_file():
        raise FileNotFoundError(f"'{card}': its scales are in {name}, which is not beside it. Get that file too.")
    return path


def read_metadata(path: str | os.PathLike, source: str | None = None) -> dict[str, Any]:
    """Reads the metadata of a card as they are there, unchecked.

    Args:
        path: The file, a `README.md`.
        source: What to call it in errors. Defaults to its path.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is too large, or its front matter cannot be read.
    """
    source = source or os.fspath(path)
    return _parse(_read_text(path, source), source)[0]


def eval_results(metrics: Mapping[str, float | str], source: str = 'metrics') -> list[EvalResult]:
    """Turns accuracies into the form in which the Hub shows them.

    Args:
        metrics: `dataset`, its name, and the results: `top1` and `top5` in percent, or others under names of their own.
        source: What to call them in errors.

    Raises:
        ValueError: If the dataset is missing, or a result is not a finite number.
    """
    dataset = metrics.get('dataset')
    if not isinstance(dataset, str) or not dataset:
        raise ValueError(f"{source}: no dataset is named. Give it along: {{'dataset': 'cifar10', 'top1': 93.1}}.")
    results = []
    for name, value in metrics.items():
        if name == 'dataset':
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{source}: '{name}' is {kind_of_value(value)}, expected a number.")
        if not math.isfinite(value):
            raise ValueError(
                f"{source}: '{name}' is {value}, expected a finite number. Publish a checkpoint from before the "
                f'training diverged, or measure it again.'
            )
        results.append(
            EvalResult(
                task_type='image-classification',
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type='accuracy' if name in METRICS else name,
                metric_name=METRICS.get(name, name),
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
    license_name: str = '',
    dataset: str = '',
) -> str:
    """Returns the text of a card with new metadata and a new generated body; whatever else it has survives.

    Args:
        path: The card as it is; there need not be one.
        body: Markdown to put between the two marks.
        model_name: Name of the model in the index of results, where the card has none yet.
        entry: The `repopt` entry. Defaults to what the card has.
        results: Results that replace those of the same dataset and metric; None drops those of `eval_results`, which
            other weights had.
        license_name: Licence of a card that states none; empty if none is known.
        dataset: What the weights of a card that names no datasets were trained on: a type and a name, `hfds/user/name`,
            or the name alone.

    Raises:
        ValueError: If the card cannot be read, or the client cannot carry its metadata through unchanged.
    """
    text = _read_text(path, str(path)) if path.is_file() else ''
    original, old_body = _parse(text, str(path))
    data = _card_data(original, path)
    # Several models, or results in a shape of their own, would come out as something else: better not to write at all.
    _check_carried(original, data, path, ignored={'tags'})
    _set_defaults(data, license_name)
    if dataset and isinstance(dataset, str):
        data.datasets = data.datasets or [_DATASET_TYPE.sub('', dataset)]
    if entry is not None:
        published = data.get(METADATA_KEY)
        version = published.get('format') if isinstance(published, Mapping) else None
        if isinstance(version, int) and version > entry['format']:
            check_version(version, f"{path}: '{METADATA_KEY}'")
        data[METADATA_KEY] = dict(entry)
    if results:
        replaced = {_identity(result) for result in results}
        kept = [result for result in data.eval_results or [] if _identity(result) not in replaced]
        data.model_name = data.model_name or model_name
        data.eval_results = [*kept, *results]
    elif results is None and data.eval_results:
        others = [result for result in data.eval_results if result.metric_name not in METRICS.values()]
        data.eval_results = others or None
    _check_carried(original, data, path, ignored={'tags', 'model-index', METADATA_KEY})
    # Of a file from Windows the rest has its line ends too.
    end = '\r\n' if 2 * text.count('\r\n') > text.count('\n') else '\n'
    metadata = data.to_yaml(line_break=end, original_order=list(original))
    updated = f'---{end}{metadata}{end}---{end}{_replace_body(old_body, scrub(body), path)}'
    _check_readable(updated, path)
    return updated


def results_in(metadata: Mapping[str, Any], path: Path) -> list[EvalResult]:
    """Returns the results that a card states.

    Args:
        metadata: The card's, as `read_metadata` returned them.
        path: The card, for errors.

    Raises:
        ValueError: If they cannot be read.
    """
    return _card_data(metadata, path).eval_results or []


def _card_data(metadata: Mapping[str, Any], path: Path) -> ModelCardData:
    try:
        return ModelCardData(**metadata)
    except (AttributeError, TypeError, ValueError) as error:
        raise _unreadable(str(path), str(error)) from None


def _check_readable(text: str, path: Path) -> None:
    """Raises a ValueError if a card that is to be written could not be read."""
    try:
        _check_size(len(text.encode('utf-8')), str(path))
        metadata = _parse(text, str(path))[0]
        if METADATA_KEY in metadata:
            decode_scales(metadata[METADATA_KEY], str(path), partial(beside, path))
    except ValueError as error:
        raise ValueError(
            f'The card is not written, as it could not be read again: {error} Shorten what it says of the training, '
            f'or its own text and metadata.'
        ) from None


def _identity(result: EvalResult) -> tuple[Any, ...]:
    # The client files results of one task and dataset together, whatever name the dataset has in each.
    return (*result.unique_identifier, result.metric_type, result.metric_name)


def _read_text(path: str | os.PathLike, source: str) -> str:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no model card '{path}'.")
    _check_size(path.stat().st_size, source)
    try:
        return path.read_bytes().decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{source}: the card is no UTF-8 text: {error}. Save it as UTF-8.') from None


def _check_size(size: int, source: str) -> None:
    if size > _MAX_CARD_BYTES:
        raise ValueError(f'{source}: a card of {size} bytes is refused, expected at most {_MAX_CARD_BYTES}.')


def _parse(text: str, source: str) -> tuple[dict[str, Any], str]:
    """Splits a card into its metadata, none if it has no front matter, and its body."""
    first = _FIRST_LINE.match(text)
    last = _LAST_LINE.search(text, first.end()) if first else None
    if first is None or last is None:
        return {}, text
    front = text[first.end() : last.start()]
    try:
        problem = refused_feature(front)
        metadata = {} if problem else yaml.load(front, _Loader) or {}
    except (yaml.YAMLError, ValueError) as error:
        problem = str(error)
    if problem is None and not isinstance(metadata, dict):
        problem = f'it should be a mapping, but is {kind_of_value(metadata)}'
    if problem is not None:
        raise _unreadable(source, problem)
    return metadata, text[last.end() :]


def _unreadable(source: str, problem: str) -> ValueError:
    problem = ' '.join(scrub(problem).split())[:500]
    return ValueError(f'{source}: its metadata cannot be read: {problem}. Mend the front matter of the card.')


def refused_feature(text: str) -> str | None:
    """Says what in a YAML text would take more time or memory to read than its size; None if nothing does."""
    # A few aliases of aliases expand to gigabytes, and deep nesting to a stack overflow; the events show both at once.
    depth = nodes = 0
    for event in yaml.parse(text, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        nodes += isinstance(event, yaml.NodeEvent)
        if isinstance(event, yaml.AliasEvent):
            return 'it uses a YAML alias, which is refused'
        if depth > _MAX_NESTING:
            return f'it is nested more than {_MAX_NESTING} levels deep, which is refused'
        if nodes > _MAX_NODES:
            return f'it has more than {_MAX_NODES} entries, which is refused'
        if len(getattr(event, 'tag', None) or '') > _MAX_TAG:
            return f'it has a tag of more than {_MAX_TAG} characters, which is refused'
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > _MAX_NUMBER and _is_number(event):
            return f'it has a number of {len(event.value)} characters, which is refused: put it in quotes'
    return None


def _is_number(event: yaml.ScalarEvent) -> bool:
    return event.tag in _NUMBER_TAGS or bool(event.implicit[0] and _NUMBER.fullmatch(event.value))


def _check_carried(original: Mapping[str, Any], data: ModelCardData, path: Path, ignored: set[str]) -> None:
    written = data.to_dict()
    for key, value in original.items():
        if key not in ignored and value is not None and written.get(key) != value:
            raise ValueError(
                f"{path}: its metadata '{key}' would not survive: huggingface_hub's ModelCard reads one model with "
                f'results in the documented form, and would write something else back. The card is left as it was; '
                f"mend '{key}' in it first."
            )


def _set_defaults(data: ModelCardData, license_name: str) -> None:
    if not data.license and license_name in HUB_LICENSES:
        data.license = license_name
    elif not data.license and license_name:
        data.license, data.license_name = 'other', license_name
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
