"""The text of a model card that people read."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from keyword import iskeyword
from typing import Any

import timm
from huggingface_hub import EvalResult

from ..architectures import ARCHITECTURES, chosen_numbers
from ..datasets import color_mode
from ..names import PREFIX, ModelName
from ..reporting import markdown_table
from ..scales import Scales, scales_table
from .card import METRICS, SCALES_FILE

SCALES_PICTURE = 'scales.png'
CURVES_FILE = 'curves.png'
WEIGHTS_FILE = 'model.safetensors'

_PAPER = '[RepOptimizers](https://arxiv.org/abs/2205.15242)'

_CLASSIFY = """transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open('image.jpg').convert('{mode}'))
probabilities = model(image[None]).softmax(-1)[0]
names = model.pretrained_cfg.get('label_names') or range(model.num_classes)
for probability, index in zip(*probabilities.topk(min(5, model.num_classes))):
    print(f'{{names[index]}}: {{probability:.1%}}')"""

_OPTIMIZER = """optimizer = timm.optim.create_optimizer_v2(
    model, '{}', lr={}, momentum=0.9, weight_decay=4e-5
)"""

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
    scales: Scales | None,
    training: Mapping[str, Any],
    license_name: str,
    results: Sequence[EvalResult],
) -> str:
    """Renders what a card says about a repository of these `files`, in Markdown; see `write_card`."""
    weights, limits = WEIGHTS_FILE in files, []
    place = f'in `{SCALES_FILE}`' if SCALES_FILE in files else 'in the metadata of this card'
    sections = [f'# {repo_id.split("/")[-1]}']
    if weights:
        beside = '' if scales is None else f' The scales that belong to them are {place}.'
        timm_link = '[timm](https://github.com/huggingface/pytorch-image-models)'
        figures = {
            f'{each.metric_name}, {each.dataset_name}': f'{each.metric_value} %'
            for each in results
            if each.metric_name in METRICS.values()
        }
        sections += [f'Weights of `{model_name}` for {timm_link}.{beside}', _facts(figures)]
        limits.append('* The model recognizes only the classes that it was trained on, in similar images.')
    else:
        sections.append(
            f'Scales of `{model_name}` for {_PAPER}: the constants by which a RepOptimizer initializes and trains the '
            f'plain model, on any data. They are {place}; there are no weights in this repository.'
        )
    owner = ' Replace `USER` with the owner of the repository.' if repo_id.startswith('USER/') else ''
    sections += [
        '## Usage',
        f'`pip install repopt-timm`; `import repopt_timm` makes its models and optimizers known to timm.{owner}',
        *_usage(f"'hf-hub:{repo_id}'", ModelName.parse(model_name), weights, scales, training),
    ]
    if scales is not None:
        sections += ['## How the scales were searched', _facts(scales.provenance) or 'Not recorded.']
        limits.append(f'* The scales belong to `{scales.architecture}` with these channels and strides.')
    if training:
        sections += ['## How the weights were trained', _facts(training)]
    if CURVES_FILE in files:
        sections.append(f'![Training loss and accuracy against epochs]({CURVES_FILE})')
    if scales is not None:
        table, strided = scales_table(scales), [name for name, each in scales.geometry.items() if max(each.stride) > 1]
        searched = f' Searched with strides at {", ".join(strided)}.' if strided else ''
        rows = [[f'{cell:.4f}' if isinstance(cell, float) else _cell(cell) for cell in row.values()] for row in table]
        sections += [
            '## Scales',
            f'One value per branch and channel of {len(scales)} convolutions. Start of the operators: {scales.start}. '
            f'Fingerprint `{scales.fingerprint}`.{searched}',
            markdown_table(('stage', 'branch', 'mean', 'min', 'max'), rows),
        ]
        if SCALES_PICTURE in files:
            sections.append(f'![Scales against depth: mean, and range over channels]({SCALES_PICTURE})')
    sections += ['## Limits', '\n'.join(limits)] if limits else []
    sections += ['## Citation', _CITATION, '## Licence', _cell(license_name) or 'Not stated.']
    return '\n\n'.join(filter(None, sections))


def model_for(network: str) -> str:
    """Returns timm's name of the model that takes a network's scales; of a network unknown to timm its own name."""
    return network if network in ARCHITECTURES or not timm.is_model(network) else PREFIX + network


def _usage(
    hub: str, name: ModelName, weights: bool, scales: Scales | None, training: Mapping[str, Any]
) -> Iterator[str]:
    if weights:
        channels = training.get('image_size', [3])[0]
        classify = [_CLASSIFY.format(mode=color_mode(channels))] if channels in (1, 3, 4) else []
        create = f'model = timm.create_model({hub}, pretrained=True).eval()'
        yield 'Use the weights:'
        yield _python('from PIL import Image', '', *_register(name), create, *classify)
    else:
        yield 'Load the scales:'
        yield _python('', f'scales = repopt_timm.load_scales({hub})')
    if scales is not None:
        yield 'Train a new model with these scales:'
        plain = ModelName.parse(model_for(name.network))
        if weights and name.kind == 'target':
            # The arguments of the network are in config.json.
            lines = [*_register(name), f'model = timm.create_model(\n    {hub},\n    num_classes=100,\n)']
            if not _takes_scales(name):
                lines.append(_prepare(hub, 'True'))
        elif _takes_scales(plain):
            own = {**chosen_numbers(scales), **_own_arguments(scales.provenance.get('model_kwargs'))}
            numbers = ''.join(f', {key}={each!r}' for key, each in own.items())
            arguments = f"'{plain.architecture}',\n    num_classes=100{numbers},\n    scales={hub},"
            lines = [*_register(plain), f'model = timm.create_model(\n    {arguments}\n)']
        else:
            lines = [f'model = ...  # your {plain.architecture}', _prepare(hub, 'True')]
        yield _python('', *lines, _OPTIMIZER.format('repopt_sgd', 0.1))
    if weights:
        lines = [*_register(name), f'model = timm.create_model(\n    {hub},\n    pretrained=True, num_classes=10,\n)']
        target = scales is not None and name.kind == 'target'
        if target and not _takes_scales(name):
            lines.append(_prepare(hub, 'False'))
        yield 'Fine-tune:'
        yield _python('', *lines, _OPTIMIZER.format('repopt_sgd' if target else 'sgd', 0.01))


def _own_arguments(given: Any) -> dict[str, Any]:
    """Returns a network's own arguments from a provenance, which may be anyone's and goes into code."""
    reserved = re.compile(r'num_classes|scales|pretrained\w*|checkpoint_path|cache_dir')
    known = given.items() if isinstance(given, Mapping) else ()
    return {key: each for key, each in known if key.isidentifier() and not (iskeyword(key) or reserved.fullmatch(key))}


def _register(name: ModelName) -> list[str]:
    return [] if name.is_registered_at_import else [f"repopt_timm.register_twins('{name.network}')"]


def _takes_scales(name: ModelName) -> bool:
    # A network of timm's own, or one unknown to it, takes its scales by a call of ours.
    return name.architecture in ARCHITECTURES or name.architecture.startswith(PREFIX)


def _prepare(hub: str, init: str) -> str:
    return f'repopt_timm.prepare(model, repopt_timm.load_scales({hub}, model), init={init})'


def _python(*lines: str) -> str:
    return '\n'.join(['```python', 'import repopt_timm, timm', *lines, '```'])


def _facts(facts: Mapping[str, Any]) -> str:
    counts = ('parameters', 'multiply_adds')
    rows = [
        (_cell(name.replace('_', ' ')), f'{value:,}' if name in counts and isinstance(value, int) else _cell(value))
        for name, value in facts.items()
    ]
    return markdown_table(('what', 'value'), rows) if rows else ''


def _cell(value: Any) -> str:
    """Returns a fact, which may come from anyone's file, as text on which neither a table nor the page breaks."""
    if isinstance(value, Mapping):
        value = ', '.join(f'{key} {item}' for key, item in value.items())
    elif isinstance(value, list | tuple):
        value = ' x '.join(map(str, value))
    text = ' '.join(str(value).split()).replace('&', '&amp;').replace('<', '&lt;')
    return text.replace('\\', '\\\\').replace('|', '\\|').replace('[', '\\[')
