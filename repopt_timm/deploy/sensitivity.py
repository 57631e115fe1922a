"""Which layers INT8 hurts: one layer at a time in INT8, on the calibration images."""

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch.nn.functional as F

from ..plot import save_figure, subplots
from ..reporting import markdown_table
from .classifier import onnx_classifier
from .evaluation import check_classes
from .onnx_graph import layers_of
from .quantization import Quantization, quantize_only

__all__ = ['layer_sensitivity', 'plot_sensitivity', 'sensitivity_table']

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
    reference = onnx_classifier(done.model)
    try:
        check_classes(reference, done.images)
        labelled = True
    except ValueError:
        labelled = False
    rows: list[dict[str, Any]] = []
    pending = _candidates(done)
    # Made when it is their turn: they may be large.
    while part := [(row, onnx_classifier(model)) for row, model in islice(pending, _MODELS)]:
        divergence, lost = [0.0] * len(part), [0] * len(part)
        for batch, targets in done.images.batches(done.indices, _BATCH, 'sensitivity'):
            expected = reference.run(batch)
            for place, (_, classifier) in enumerate(part):
                found = classifier.run(batch)
                mine, theirs = (logits.double().log_softmax(1) for logits in (found, expected))
                divergence[place] += F.kl_div(mine, theirs, reduction='sum', log_target=True).item()
                lost[place] += int((expected.argmax(1) == targets).sum() - (found.argmax(1) == targets).sum())
        for (row, _), nats, count in zip(part, divergence, lost):
            drop = {'drop': 100 * count / len(done.indices)} if labelled else {}
            rows.append({**row, **drop, 'kl': nats / len(done.indices)})
    whole, *layers = rows
    layers.sort(key=lambda row: (row.get('drop', 0), row['kl']), reverse=True)
    return {'images': len(done.indices), 'labelled': labelled, 'int8': whole, 'layers': layers}


def _candidates(done: Quantization) -> Iterator[tuple[dict[str, str], Any]]:
    """Yields the quantized model, then the model with one layer of those that are quantized there at a time."""
    yield {}, done.quantized
    nodes = {node.name: node for node in done.quantized.graph.node}
    roundings = {node.output[0] for node in nodes.values() if node.op_type == 'DequantizeLinear'}
    for name, node in layers_of(done.model).items():
        if roundings.intersection(nodes[node.name].input[1:2]):
            following = node.successors()
            # The rounding comes after these, as in the whole model.
            alone = len(following) == 1 and following[0].op_type in ('Relu', 'Clip')
            only = [node.name, *(user.name for user in following if alone)]
            yield {'layer': name, 'operator': node.op_type}, quantize_only(done.model, done.ranges, done.options, only)


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
    measures = {'drop': 'drop in top-1 (points)'} if report['labelled'] else {}
    measures['kl'] = 'KL from float32 (nats)'
    size = 3 + 4 * len(measures), 1.5 + 0.2 * max(len(rows), 5)
    figure, (panels,) = subplots(1, len(measures), size, layout='constrained', sharey=True, squeeze=False)
    for axes, (name, label) in zip(panels, measures.items()):
        axes.barh(range(len(rows)), [row[name] for row in rows], color='tab:blue', height=0.7)
        axes.axvline(report['int8'][name], color='tab:red', lw=1, label='all layers')
        axes.set_xlabel(label)
        axes.legend(frameon=False, loc='lower right')
    if report['int8']['kl'] > 0:
        panels[-1].set_xscale('log')
    panels[0].set_yticks(range(len(rows)), [row['layer'] for row in rows], fontsize=7)
    panels[0].invert_yaxis()
    figure.suptitle(f'One layer in INT8 at a time, {report["images"]} calibration images', fontsize=11)
    save_figure(figure, path)
