"""The text of a model card that people read."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import timm
from huggingface_hub import EvalResult
from torch import Tensor

from ..architectures import ARCHITECTURES
from ..datasets import color_mode
from ..names import PREFIX, ModelName
from ..reparam import Geometry
from ..scales import Scales, scales_table
from .document import METRICS
from .format import SCALES_FILE

__all__ = ['CURVES_FILE', 'SCALES_PICTURE', 'WEIGHTS_FILE', 'model_for', 'render_body']

SCALES_PICTURE = 'scales.png'
CURVES_FILE = 'curves.png'
WEIGHTS_FILE = 'model.safetensors'

# Kinds of models with branches, by the end of their names.
_ROLES = {
    'hs': 'multi-branch network with trainable scales that a hyper-search trains',
    'csla': 'multi-branch CSLA network with constant scales, which validates the training of a plain one',
}

_CLASSIFY = """transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open('image.jpg').convert('RGB'))
probabilities = model(image[None]).softmax(-1)[0]
names = model.pretrained_cfg.get('label_names') or range(model.num_classes)
for probability, index in zip(*probabilities.topk(min(5, model.num_classes))):
    print(f'{names[index]}: {probability:.1%}')"""

# What of the facts about weights stands at the top of a card.
_SIZES = ('image_size', 'parameters', 'multiply_adds')
_MOST_RESULTS = 4
_MOST = 1e15

_CITATION = """```bibtex
@inproceedings{ding2023reparameterizing,
  title     = {Re-parameterizing Your Optimizers rather than Architectures},
  author    = {Ding, Xiaohan and Chen, Honghao and Zhang, Xiangyu and Huang, Kaiqi and Han, Jungong and Ding, Guiguang},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2023},
  url       = {https://arxiv.org/abs/2205.15242}
}
```"""


def render_body(
    repo_id: str,
    model_name: str,
    files: Collection[str],
    scales: Scales | None = None,
    training: Mapping[str, Any] | None = None,
    license_name: str = '',
    results: Sequence[EvalResult] = (),
) -> str:
    """Renders what a card says about a repository, in Markdown.

    Args:
        repo_id: Name of the repository on the Hub.
        model_name: Name of the model in timm.
        files: Names of the files beside the card.
        scales: Its scales, if it has any.
        training: How the weights were trained, as far as known.
        license_name: Licence that the card's metadata names; empty if they name none.
        results: Measured accuracies.
    """
    weights = WEIGHTS_FILE in files
    where = f'in `{SCALES_FILE}`' if SCALES_FILE in files else 'in the metadata of this card'
    sections = [
        f'# {repo_id.split("/")[-1]}',
        _summary(model_name, weights, scales, where),
        *([_figures(results, training or {})] if weights else []),
        '## Usage',
        '`pip install repopt-timm`; `import repopt_timm` makes its models and optimizers known to timm.'
        + (' Replace `USER` by the owner of the repository.' if repo_id.startswith('USER/') else ''),
        *_usage(repo_id, model_name, weights, scales, _image_mode(training or {})),
        *_history(files, scales, training),
        *_scales_section(files, scales),
        '## Limits',
        *_limits(weights, scales),
        '## Citation',
        _CITATION,
        '## Licence',
        _cell(license_name) or 'Not stated.',
    ]
    return '\n\n'.join(sections)


def _summary(model_name: str, weights: bool, scales: Scales | None, where: str) -> str:
    paper = '[RepOptimizers](https://arxiv.org/abs/2205.15242)'
    branches = _ROLES.get(ModelName.parse(model_name).kind)
    of_model = f'Weights of `{model_name}` for [timm](https://github.com/huggingface/pytorch-image-models)'
    if model_name not in ARCHITECTURES and scales is None:
        return f'{of_model}.'
    if weights and branches is not None:
        return f'{of_model}, the {branches} of {paper}.' + (
            f' Its scales are {where}, for training a plain model.' if scales is not None else ''
        )
    if weights and scales is not None:
        return (
            f'{of_model}, and the scales of {paper} that belong to them: an image classifier of plain '
            f'convolutions, whose structural prior is in its optimizer instead of its branches. The scales are '
            f'{where}.'
        )
    if weights:
        return (
            f'{of_model}, an image classifier of plain convolutions from {paper}. Its scales are not part of this '
            f'repository.'
        )
    return (
        f'Scales of `{model_name}` for {paper}: the constants by which a RepOptimizer initializes and trains the plain '
        f'model, on any data. They are {where}; there are no weights in this repository.'
    )


def _figures(results: Sequence[EvalResult], training: Mapping[str, Any]) -> str:
    """Returns what people choose a model by, as a table of one row; nothing if nothing is known."""
    shown = [each for each in results if each.metric_name in METRICS.values() and _is_number(each.metric_value)]
    cells = {f'{each.metric_name}, {each.dataset_name}': f'{each.metric_value:.2f} %' for each in shown[:_MOST_RESULTS]}
    if size := _image_size(training):
        cells['image size'] = _text(size)
    for name in ('parameters', 'multiply_adds'):
        count: Any = training.get(name)
        if _is_number(count):
            cells[name.replace('_', ' ')] = f'{count / 1e6:,.1f} M'
    if not cells:
        return ''
    rows = (cells, ['---:'] * len(cells), cells.values())
    return '\n'.join(f'| {" | ".join(_cell(cell) for cell in row)} |' for row in rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MOST


def _image_size(training: Mapping[str, Any]) -> list[int] | None:
    size = training.get('image_size')
    return size if isinstance(size, list) and len(size) == 3 and all(map(_is_number, size)) else None


def _image_mode(training: Mapping[str, Any]) -> str | None:
    """Returns PIL's name of the images that a model takes; None if PIL opens none of so many channels."""
    try:
        return color_mode((_image_size(training) or [3])[0], training.get('image_mode'))
    except ValueError:
        return None


def _usage(repo_id: str, model_name: str, weights: bool, scales: Scales | None, mode: str | None) -> list[str]:
    hub = f"'hf-hub:{repo_id}'"
    load = f'model = timm.create_model({hub}, pretrained=True).eval()'
    register = _registration(model_name)
    snippets = []
    if weights:
        if mode is None:
            snippets += ['Load the model:', _python(*register, load)]
        else:
            classify = _CLASSIFY.replace('RGB', mode)
            snippets += ['Classify an image:', _python('from PIL import Image', '', *register, load, classify)]
    elif scales is not None:
        snippets += [
            'Load the scales:',
            f'```python\nfrom repopt_timm import load_scales\n\nscales = load_scales({hub})\n```',
        ]
    if scales is not None:
        snippets += [
            'Train a new model with these scales:',
            _python(*_scaled(hub, model_name, scales), _optimizer('repopt_sgd', 0.1)),
        ]
    if weights:
        lines = [*register, _create(hub, 'pretrained=True, num_classes=10')]
        plain_with_scales = scales is not None and ModelName.parse(model_name).kind == 'target'
        if plain_with_scales and not _takes_scales(model_name):
            lines.append(f'repopt_timm.attach_scales(model, repopt_timm.load_scales({hub}, model))')
        rule = _optimizer('repopt_sgd' if plain_with_scales else 'sgd', 0.01)
        snippets += ['Fine-tune:', _python(*lines, rule)]
    elif scales is not None:
        snippets += [
            'Fine-tune the scales, in a search on other data that starts from them:',
            _python(*_scaled(hub, model_name, scales, 'hs')),
        ]
    return snippets


def model_for(network: str) -> str:
    """Returns timm's name of the model that takes a network's scales; of a network unknown to timm its own name."""
    return network if network in ARCHITECTURES or not timm.is_model(network) else PREFIX + network


def _takes_scales(model_name: str) -> bool:
    architecture = ModelName.parse(model_name).architecture
    return architecture in ARCHITECTURES or architecture.startswith(PREFIX)


def _scaled(hub: str, model_name: str, scales: Scales, kind: str = 'target') -> list[str]:
    """Returns lines that make the plain network with its scales, or a search that starts from them."""
    name = ModelName.parse(model_for(ModelName.parse(model_name).network))
    if _takes_scales(name.architecture):
        size = f'num_classes=100{_numbers(scales)}'
        return [*_registration(name.architecture), _create(f"'{name.of_kind(kind)}'", size, f'scales={hub}')]
    use = (
        'repopt_timm.prepare(model, scales)' if kind == 'target' else 'search = repopt_timm.hyper_search(model, scales)'
    )
    return [f'model = ...  # your {name.architecture}', f'scales = repopt_timm.load_scales({hub}, model)', use]


def _numbers(scales: Scales) -> str:
    """Returns the arguments by which the network that scales were searched on differs from its architecture."""
    own = ARCHITECTURES.get(scales.architecture)
    stages: dict[str, list[Geometry]] = {}
    for name, each in scales.geometry.items():
        stages.setdefault(name.removesuffix('.conv').rpartition('.')[0], []).append(each)
    if own is None or not stages:
        return ''
    first = [stage[0] for stage in stages.values()]
    depths = [len(stage) for stage in stages.values()][1:]
    chosen = own.arguments(depths, [each.out_channels for each in first], [each.stride[0] for each in first])
    return ''.join(f', {name}={numbers}' for name, numbers in chosen.items())


def _optimizer(name: str, lr: float) -> str:
    settings = f'lr={lr}, momentum=0.9, weight_decay=4e-5'
    return f"optimizer = timm.optim.create_optimizer_v2(\n    model, '{name}', {settings}\n)"


def _create(*arguments: str) -> str:
    lines = ''.join(f'    {argument},\n' for argument in arguments)
    return f'model = timm.create_model(\n{lines})'


def _python(*lines: str) -> str:
    gap = [] if lines[0].startswith('from ') else ['']
    return '\n'.join(['```python', 'import repopt_timm, timm', *gap, *lines, '```'])


def _registration(model_name: str) -> list[str]:
    name = ModelName.parse(model_name)
    return [] if name.is_registered_at_import else [f"repopt_timm.register_twins('{name.network}')"]


def _history(files: Collection[str], scales: Scales | None, training: Mapping[str, Any] | None) -> list[str]:
    sections = []
    if scales is not None:
        sections += ['## How the scales were searched', _facts(scales.provenance) or 'Not recorded.']
    facts = {name: value for name, value in (training or {}).items() if name not in _SIZES}
    if facts:
        sections += ['## How the weights were trained', _facts(facts)]
    if CURVES_FILE in files:
        sections.append(f'![Training loss and accuracy against epochs]({CURVES_FILE})')
    return sections


def _scales_section(files: Collection[str], scales: Scales | None) -> list[str]:
    if scales is None:
        return []
    strided = [name for name, each in scales.geometry.items() if max(each.stride) > 1]
    searched = f' Searched with strides at {", ".join(strided)}.' if strided else ''
    sections = [
        '## Scales',
        f'One value per branch and channel of {len(scales)} convolutions.{searched} Fingerprint '
        f'`{scales.fingerprint}`.',
        _table(scales),
    ]
    if SCALES_PICTURE in files:
        sections.append(f'![Scales against depth: mean, and range over channels]({SCALES_PICTURE})')
    return sections


def _limits(weights: bool, scales: Scales | None) -> list[str]:
    limits = []
    if scales is not None:
        limits.append(
            f'* The scales belong to `{scales.architecture}` with these channels and strides, and to no other network. '
            f'They are meant to be carried from one data set to another; compare with `--scales initial`, the '
            f'unsearched values, to see how well that works for yours.'
        )
    if weights:
        limits.append(
            '* The weights know the classes and the kind of images that they were trained on, and share the biases of '
            'these. Measure on your own data before you rely on them.'
        )
    return ['\n'.join(limits)]


def _facts(facts: Mapping[str, Any]) -> str:
    lines = []
    for name, value in facts.items():
        lines.append(f'| {_cell(str(name).replace("_", " "))} | {_cell(_text(value))} |')
    return '\n'.join(['| what | value |', '|---|---|', *lines]) if lines else ''


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ', '.join(f'{key} {item}' for key, item in value.items())
    if isinstance(value, list | tuple):
        return ' x '.join(str(item) for item in value)
    return str(value)


def _table(modules: Mapping[str, Mapping[str, Tensor]]) -> str:
    lines = ['| stage | branch | mean | min | max |', '|---|---|---:|---:|---:|']
    for row in scales_table(modules):
        numbers = ' | '.join(f'{row[name]:.4f}' for name in ('mean', 'min', 'max'))
        lines.append(f'| {_cell(row["stage"])} | {_cell(row["branch"])} | {numbers} |')
    return '\n'.join(lines)


def _cell(value: object) -> str:
    # Provenance may come from anyone's file: neither a table nor the page may break on it.
    text = ' '.join(str(value).split()).replace('&', '&amp;').replace('<', '&lt;')
    return text.replace('\\', '\\\\').replace('|', '\\|').replace('[', '\\[')
