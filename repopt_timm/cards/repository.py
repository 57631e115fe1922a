"""Repositories with a card, in a folder or on the Hub: how any is written, and the ones that hold scales alone."""

import base64
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..checkpoints.read import LAST_CHECKPOINT
from ..errors import explaining, scrub
from ..files import check_output, check_output_folder, naming_write_errors, replacing
from ..plot import plot_scales
from ..scales import Scales
from ..weights_origin import license_identifier
from .card import (
    CARD_FILE,
    HUB_LICENSES,
    METADATA_KEY,
    METRICS,
    SCALES_FILE,
    checked_license,
    dataset_id,
    encode_scales,
    read_metadata,
    stated_license,
)
from .hub import push_folder
from .text import CURVES_FILE, SCALES_PICTURE, WEIGHTS_FILE, model_for, render_body

CONFIG_FILE = 'config.json'
BEGIN = '<!-- repopt-timm: begin. Text up to the end mark is rewritten with the scales; write yours outside of it. -->'
END = '<!-- repopt-timm: end -->'

# In base64 a third of the largest card that is read.
_LARGE = 1 << 20

_logger = logging.getLogger(__name__)


def push_scales(
    scales: Scales,
    repo_id: str,
    scales_file: bool = False,
    license: str | None = None,
    commit_message: str = 'Scales of repopt-timm',
    **options: Any,
) -> str:
    """Publishes scales on the Hugging Face Hub; weights that the repository has stay as they are.

    Args:
        scales: The scales.
        repo_id: Name of the repository, `user/repo`, made if there is none.
        scales_file: Put the scales into `scales.safetensors`, as is done when the Hub refuses the card as too large.
        license: Identifier of the licence, such as `mit`, for a card that states none. Defaults to what the provenance
            of the scales names; without one the card states none.
        commit_message: Title of the commit.
        options: `private`, `revision`, `create_pr` and `token`, see `push_to_hub`.

    Returns:
        Address of the commit or pull request.

    Raises:
        HubError: If the repository cannot be written to.
        ValueError: If an existing card cannot be read, or could not be carried through unchanged, or the licence is
            not an identifier.
    """
    return push_folder(repo_id, _writer(scales, license), commit_message, scales_file, **options)


def save_scales_card(
    scales: Scales,
    directory: str | os.PathLike,
    repo_id: str | None = None,
    scales_file: bool = False,
    license: str | None = None,
) -> None:
    """Writes a folder with a model card that holds scales; see `save_folder` and `push_scales`."""
    check_folder(directory)
    save_folder(directory, _writer(scales, license), repo_id, scales_file)


def _writer(scales: Scales, license: str | None) -> Callable[..., None]:
    # What no card can hold is an error before anything is made.
    encode_scales(scales)
    model_name, license_name = model_for(scales.architecture), checked_license(license)
    return partial(write_card, model_name=model_name, scales=scales, license_name=license_name)


def check_folder(directory: str | os.PathLike, *inputs: Any) -> None:
    """Checks that a repository can be written into a folder, and would replace no input, before the work for it."""
    if (Path(directory) / LAST_CHECKPOINT).exists():
        raise ValueError(f"'{directory}' is the folder of a run, whose files would be replaced: name another one.")
    for file in (WEIGHTS_FILE, CONFIG_FILE, SCALES_PICTURE, SCALES_FILE, CURVES_FILE, CARD_FILE):
        check_output(check_output_folder(directory) / file, *inputs)


def save_folder(
    directory: str | os.PathLike, write: Callable[..., None], repo_id: str | None = None, scales_file: bool = False
) -> None:
    """Puts what `write` makes, called like `write_card`, into a folder, each file whole or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Everything is made beside its place first: an error in the middle leaves the directory as it was.
    with naming_write_errors(directory), TemporaryDirectory(prefix='.repopt-timm-', dir=directory) as name:
        folder, published = Path(name), frozenset(os.listdir(directory))
        for file in published & {CARD_FILE, SCALES_FILE}:
            shutil.copyfile(directory / file, folder / file)
        write(folder, repo_id or f'USER/{directory.resolve().name}', published, scales_file, directory)
        made = os.listdir(folder)
        # The card comes last: it describes the others.
        for file in sorted(made, key=lambda file: file == CARD_FILE):
            # safetensors makes private files, `replacing` ordinary ones.
            with replacing(directory / file) as temporary:
                os.replace(folder / file, temporary)
        if WEIGHTS_FILE in made:
            # What describes the weights that were replaced.
            for file in {CURVES_FILE, SCALES_PICTURE, SCALES_FILE}.difference(made):
                (directory / file).unlink(missing_ok=True)


def write_card(
    folder: Path,
    repo_id: str,
    published: Collection[str],
    scales_file: bool,
    source: str | os.PathLike = '',
    *,
    model_name: str,
    scales: Scales | None,
    license_name: str = '',
    training: Mapping[str, Any] | None = None,
    results: Sequence[EvalResult] = (),
    weights_license: str = '',
) -> None:
    """Writes the card of a folder, and the picture of its scales; what else an existing card says survives.

    `published` are files that the repository has besides, `source` is what errors call the folder, and `training` is
    None if the weights stay as they are. Licences default to what the card has, or the scales state. Without `scales`,
    the card loses the ones that it has: they belong to other weights.
    """
    path, where = folder / CARD_FILE, f'{source or repo_id}/{CARD_FILE}'
    if not path.is_file():
        path.write_text('---\n\n---\n')
    before = read_metadata(path, where)
    with explaining(f'{where}: its metadata cannot be read'):
        card = ModelCard(path.read_bytes().decode('utf-8-sig'), ignore_metadata_errors=True)
    data: Any = card.data
    if data.to_dict().get('model-index') != before.get('model-index'):
        # Several models, or results in a form of their own.
        raise ValueError(f"{where}: its 'model-index' would not survive, as huggingface_hub reads it otherwise.")
    found, title = before.get(METADATA_KEY, {}), repo_id.split('/')[-1]
    facts = found.get('training') if training is None else training
    files = {*os.listdir(folder), *published} - {SCALES_FILE, SCALES_PICTURE}
    if CURVES_FILE not in os.listdir(folder) and (training is not None or f'({CURVES_FILE})' not in card.text):
        # A picture that is there already is of other weights' training.
        files.discard(CURVES_FILE)
    if scales is not None:
        entry, content = encode_scales(scales, facts)
        facts = entry.get('training')
        if scales_file or 'file' in found or len(content) > _LARGE:
            files.add(SCALES_FILE)
            entry['file'] = SCALES_FILE
            (folder / SCALES_FILE).write_bytes(content)
        else:
            entry['scales'] = base64.b64encode(content).decode()
        data[METADATA_KEY] = entry
        if draw(plot_scales, scales, folder / SCALES_PICTURE, scales.title):
            files.add(SCALES_PICTURE)
        if WEIGHTS_FILE not in files:
            weights_license = license_identifier(scales.provenance.get('license'))
    else:
        data.pop(METADATA_KEY, None)
        if 'file' in found:
            (folder / SCALES_FILE).unlink(missing_ok=True)
    facts, stated = facts or {}, stated_license(before)
    known = dict.fromkeys((license_name, weights_license))
    license_name = stated or license_name or weights_license
    if differing := [each for each in known if each and each.lower() != license_name.lower()]:
        _logger.warning(
            f'The card of {title} states the licence {license_name}, but {" and ".join(differing)} was given, or is '
            f'known of its content. Correct `license` in the card if it is wrong.'
        )
    if not license_name:
        _logger.warning(f'The card of {title} states no licence, as none is known. Give one with --license (license=).')
    elif not stated:
        on_hub = license_name in HUB_LICENSES.split()
        data.license, data.license_name = (license_name, None) if on_hub else ('other', license_name)
    data.library_name = data.library_name or 'timm'
    data.pipeline_tag = data.pipeline_tag or 'image-classification'
    data.tags = list(dict.fromkeys([*(data.tags or []), 'image-classification', 'timm', 'repopt']))
    if WEIGHTS_FILE in files and (dataset := dataset_id(facts.get('dataset', ''))):
        earlier = dict(found.get('training') or {}).get('dataset', '')
        if data.datasets in (None, [], [dataset_id(earlier)]):
            data.datasets = [dataset]
    if training is not None:
        others = [
            each
            for each in data.eval_results or []
            if each.metric_name not in METRICS.values() and not any(map(each.is_equal_except_value, results))
        ]
        data.eval_results = [*others, *results] or None
        data.model_name = (data.model_name or title) if data.eval_results else None
    body = render_body(repo_id, model_name, files, scales, facts, license_name, data.eval_results or ())
    card.text = _with_block(card.text, f'{BEGIN}\n{scrub(body).strip()}\n{END}', where)
    card.save(path)
    # Do not publish a card that cannot be read back.
    read_metadata(path, where)


def _with_block(text: str, block: str, where: str) -> str:
    """Puts our block in the place of the one that a card's text has, or else below the text."""
    if BEGIN not in text and END not in text:
        return '\n' + f'{text.strip()}\n\n{block}\n'.lstrip('\n')
    above, _, rest = text.partition(BEGIN)
    _, end, below = rest.partition(END)
    if not end or BEGIN in rest or END in above + below:
        raise ValueError(f'{where}: expected one begin mark of repopt-timm and one end mark after it. Delete them.')
    return above + block + below


def draw(plot: Callable[..., None], content: Any, path: Path, *args: Any) -> bool:
    """Draws a picture of a card, unless matplotlib is not installed; returns whether it did."""
    try:
        plot(content, path, *args)
    except ImportError as error:
        _logger.warning(f'The card has no {path.name}: {error}')
        return False
    return True
