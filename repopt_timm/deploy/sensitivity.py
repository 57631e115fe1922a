"""Which layers INT8 hurts: one layer at a time in INT8, and the fewest in float32 that keep the accuracy."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..plot import save_figure, subplots
from ..reporting import markdown_table
from .classifier import image_input, onnx_classifier
from .evaluation import alternate, check_classes, is_steady, random_images
from .onnx_graph import layers_of, next_layer
from .quantization import Quantization, excluded_nodes, quantize_nodes, requantized_layers

__all__ = ['keep_in_float', 'layer_sensitivity', 'plot_sensitivity', 'sensitivity_table']

# Models that are open at a time.
_MODELS = 8
_BATCH = 32


def layer_sensitivity(done: Quantization) -> dict[str, Any]:
    """Measures a model with one layer at a time in INT8, on its calibration images.

    Args:
        done: What `quantize_onnx` returned.

    Returns:
        Plain data: `images`; `labelled`, whether their folders are the classes of the model; `int8`, the whole model;
        and `layers`, the most sensitive one first, each with `layer` and `operator`. Both have `kl`, the mean
        Kullback-Leibler divergence of the probabilities from those of float32, in nats, and, if labelled, `drop` in
        top-1 accuracy, in points. Layers are ranked by the drop, if labelled, then by the divergence.

    Raises:
        ValueError: If an image does not decode.
    """
    judge = _Judge(done)
    candidates = _candidates(done)
    whole = judge.measure([done.quantized])[0]
    rows = []
    for name, row in zip(candidates, judge.measure(_with_one_layer(done, node) for node in candidates.values())):
        rows.append({'layer': name, 'operator': candidates[name].op_type, **row})
    rows.sort(key=lambda row: (row.get('drop', 0), row['kl']), reverse=True)
    return {'images': len(done.indices), 'labelled': judge.labelled, 'int8': whole, 'layers': rows}


def keep_in_float(
    done: Quantization, report: Mapping[str, Any], max_drop: float
) -> tuple[Quantization, dict[str, Any]]:
    """Leaves the fewest layers in float32 with which a model loses no more than `max_drop`, in the order of a report.

    Args:
        done: What `quantize_onnx` returned.
        report: What `layer_sensitivity` returned for it.
        max_drop: In points of top-1 accuracy on the calibration images.

    Returns:
        The model, and plain data: `kept`, the layers that are in float32; `drop`; and milliseconds for an image, `ms`
        of this model and of `int8_ms`, or None if the times are not steady.

    Raises:
        ValueError: If the images have no labels, one does not decode, or float32 in all layers still loses more.
    """
    judge = _Judge(done)
    check_classes(judge.reference, done.images)
    ranking = [row['layer'] for row in report['layers']]
    kept: list[str] = []
    chosen, drop = done, report['int8']['drop']
    for start in range(0, len(ranking), _MODELS):
        if drop <= max_drop:
            break
        counts = range(start + 1, min(start + _MODELS, len(ranking)) + 1)
        sets = [_neighbours_too(done, ranking[:count]) for count in counts]
        models = [_without(done, names) for names in sets]
        for names, model, row in zip(sets, models, judge.measure(models)):
            kept, drop = names, row['drop']
            options = replace(done.options, exclude=(*done.options.exclude, *names))
            chosen = replace(done, quantized=model, options=options)
            if drop <= max_drop:
                break
    if not drop <= max_drop:
        raise ValueError(
            f'At most {max_drop} points lost cannot be reached: with all {len(ranking)} layers in float32 it is still '
            f"{drop:.2f}, from other operators that are quantized. Take the target 'tensorrt', which rounds the inputs "
            f'of layers only, or exclude such operators.'
        )
    return chosen, {'kept': kept, 'drop': drop, **_times(done, chosen)}


@dataclass
class _Judge:
    """Compares models with the float one on the calibration images."""

    done: Quantization

    def __post_init__(self) -> None:
        self.reference = onnx_classifier(self.done.model)
        try:
            check_classes(self.reference, self.done.images)
            self.labelled = True
        except ValueError:
            self.labelled = False

    def measure(self, models: Iterable[Any]) -> list[dict[str, float]]:
        rows: list[dict[str, float]] = []
        pending = iter(models)
        # Made when it is their turn: they may be large.
        while part := list(islice(pending, _MODELS)):
            rows += self._measure(part)
        return rows

    def _measure(self, models: Sequence[Any]) -> list[dict[str, float]]:
        classifiers = [onnx_classifier(model) for model in models]
        divergence, lost = np.zeros(len(models)), np.zeros(len(models))
        indices = self.done.indices
        for batch, targets in self.done.images.batches(indices, _BATCH, 'sensitivity'):
            expected = self.reference.run(batch)
            for number, classifier in enumerate(classifiers):
                found = classifier.run(batch)
                divergence[number] += _divergence(expected, found)
                lost[number] += int((expected.argmax(1) == targets).sum() - (found.argmax(1) == targets).sum())
        rows = [{'kl': float(value) / len(indices)} for value in divergence]
        if self.labelled:
            rows = [{'drop': 100 * float(value) / len(indices), **row} for value, row in zip(lost, rows)]
        return rows


def _divergence(expected: Tensor, found: Tensor) -> float:
    first, second = (logits.double().log_softmax(1) for logits in (expected, found))
    return torch.nn.functional.kl_div(second, first, reduction='sum', log_target=True).item()


def _candidates(done: Quantization) -> dict[str, Any]:
    """Layers that are in INT8."""
    nodes = {node.name: node for node in done.quantized.graph.node}
    roundings = {node.output[0] for node in done.quantized.graph.node if node.op_type == 'DequantizeLinear'}
    return {
        name: node
        for name, node in layers_of(done.model).items()
        if roundings.intersection(nodes[node.name].input[1:2])
    }


def _with_one_layer(done: Quantization, node: Any) -> Any:
    following = [other for other in done.model.graph.node if node.output[0] in other.input]
    # The rounding comes after these, as in the whole model.
    activation = [other.name for other in following if other.op_type in ('Relu', 'Clip')] if len(following) == 1 else []
    return quantize_nodes(done.model, done.ranges, done.options, only=[node.name, *activation])


def _without(done: Quantization, layers: Sequence[str]) -> Any:
    nodes = layers_of(done.model)
    names = {*(nodes[layer].name for layer in layers), *excluded_nodes(done.model, done.options.exclude).values()}
    return quantize_nodes(done.model, done.ranges, done.options, exclude=sorted(names))


def _neighbours_too(done: Quantization, layers: Sequence[str]) -> list[str]:
    """Adds the following layer where ONNX Runtime would quantize a single one."""
    nodes, kept = layers_of(done.model), list(layers)
    while True:
        alone = requantized_layers(_without(done, kept), {layer: nodes[layer].name for layer in kept})
        more = [other for layer in alone if (other := next_layer(done.model, layer)) and other not in kept]
        if not more:
            return kept
        kept += dict.fromkeys(more)


def _times(done: Quantization, chosen: Quantization) -> dict[str, Any]:
    models = {'int8_ms': done.quantized, 'ms': chosen.quantized}
    classifiers = {name: onnx_classifier(model) for name, model in models.items()}
    batch = image_input(done.model)[1][0] or 1
    images = random_images(classifiers['ms'].config, batch)
    turns = alternate({name: partial(classifier.run, images) for name, classifier in classifiers.items()})
    times = {name: [*chain.from_iterable(found)] for name, found in turns.items()}
    steady = all(map(is_steady, times.values()))
    return {name: 1000 * median(values) / batch if steady else None for name, values in times.items()}


def sensitivity_table(report: Mapping[str, Any], most: int | None = None) -> str:
    """Formats what `layer_sensitivity` returned as Markdown, the `most` sensitive layers or all."""
    rows = [{'layer': 'all', 'operator': '', **report['int8']}, *report['layers'][:most]]
    drop = ['drop'] if report['labelled'] else []
    body = [[row['layer'], row['operator'], *(f'{row[name]:.2f}' for name in drop), f'{row["kl"]:.2e}'] for row in rows]
    return markdown_table(['layer in INT8', 'operator', *drop, 'KL'], body, align=True)


def plot_sensitivity(report: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Draws what `layer_sensitivity` returned, the most sensitive layer on top.

    Args:
        report: What `layer_sensitivity` returned.
        path: Picture to write, in the format that its suffix names.

    Raises:
        ImportError: If matplotlib is not installed.
        OSError: If the picture cannot be written.
    """
    rows = report['layers']
    measures = [('drop', 'drop in top-1 (points)'), ('kl', 'KL from float32 (nats)')][0 if report['labelled'] else 1 :]
    height = 1.5 + 0.2 * max(len(rows), 5)
    size = 3 + 4 * len(measures), height
    figure, (panels,) = subplots(1, len(measures), size, layout='constrained', sharey=True, squeeze=False)
    for axes, (name, label) in zip(panels, measures):
        axes.barh(range(len(rows)), [row[name] for row in rows], color='tab:blue', height=0.7)
        axes.axvline(report['int8'][name], color='tab:red', lw=1, label='all layers')
        axes.set_xlabel(label)
        axes.grid(axis='x', color='0.9')
        axes.set_axisbelow(True)
        axes.legend(frameon=False, loc='lower right')
    if report['int8']['kl'] > 0:
        panels[-1].set_xscale('log')
    panels[0].set_yticks(range(len(rows)), [row['layer'] for row in rows], fontsize=7)
    panels[0].margins(y=0.01)
    panels[0].invert_yaxis()
    figure.suptitle(f'One layer in INT8 at a time, {report["images"]} calibration images', fontsize=11)
    save_figure(figure, path)
