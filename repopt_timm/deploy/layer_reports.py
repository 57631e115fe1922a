"""What INT8 does to a model layer by layer: the noise in weights and activations, and the accuracy each layer costs."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from scipy.stats import kurtosis

from ..files import write_text
from ..plot import save_figure, subplots
from ..reporting import markdown_table
from .classifier import onnx_classifier
from .evaluation import check_classes
from .onnx_graph import feeds, layers_of, tensor_values
from .quantization import Quantization, quantize
from .runtime import require


def layer_report(done: Quantization, images: int = 16) -> dict[str, Any]:
    """Compares a model with its quantized form, layer by layer.

    The signal-to-noise ratios are `20 log10(|x| / |x - x'|)` in dB, x being float32 values and x' those of the
    quantized model. Higher is better; a bit is worth 6 dB.

    Args:
        done: What `quantize_onnx` returned.
        images: Number of its calibration images to run; all their activations are in memory, twice.

    Returns:
        Plain data: `options`; `logits_snr_db`; and `layers`, in the order of the network, each with `layer` and
        `operator`; `std` and `kurtosis` (3 for a normal distribution) of its weights, BatchNorm folded in; and, for
        layers in INT8, `weight_snr_db` and `accumulated_snr_db`, in which the noise of all layers before has added up.
    """
    ratio = require('onnxruntime.quantization.qdq_loss_debug').compute_signal_to_quantization_noice_ratio
    layers = layers_of(done.model)
    inputs, restored = _inputs(done.quantized)
    batches = [*feeds(done.model, done.images, done.indices[:images], 'report', images)]
    exact = [*tensor_values(done.model, (node.inputs[0].name for node in layers.values()), batches)]
    rounded = [*tensor_values(done.quantized, restored, batches)]
    rows = []
    for name, node in layers.items():
        weight = node.inputs[1].const_value.numpy()
        row = {'layer': name, 'operator': node.op_type, 'std': weight.std(dtype=float).item()}
        row['kurtosis'] = float(kurtosis(weight.astype(float), None, fisher=False))
        read, kernel = inputs[node.name][:2]
        if read in restored:
            expected = [batch[node.inputs[0].name] for batch in exact]
            row['accumulated_snr_db'] = ratio(expected, [batch[read] for batch in rounded])
        if kernel in restored:
            row['weight_snr_db'] = ratio(weight, rounded[0][kernel])
        rows.append(row)
    return {'options': asdict(done.options), 'logits_snr_db': done.logits_snr_db, 'layers': rows}


def write_reports(reports: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Writes `layer_report`s by their titles as `layers.json`, and draws them side by side as `layers.png`."""
    write_text(folder / 'layers.json', json.dumps(reports, indent=2) + '\n')
    panels = ('standard deviation of weights', 'kurtosis of weights, 3 if normal', 'signal to noise (dB)')
    curves = {'std': (0, ''), 'kurtosis': (1, ''), 'weight_snr_db': (2, 'weights')}
    curves['accumulated_snr_db'] = 2, "layer's input"
    size = 7 * len(reports), 9.5
    figure, grid = subplots(3, len(reports), size, layout='constrained', sharey='row', sharex='col', squeeze=False)
    for column, (title, report) in zip(grid.T, reports.items()):
        rows = report['layers']
        for key, (place, name) in curves.items():
            # Layers in float32 leave a gap.
            values = [row.get(key, np.nan) for row in rows]
            column[place].plot([row['layer'] for row in rows], values, 'o-', ms=4, label=name)
        for axes, label in zip(column, panels):
            axes.set(ylabel=label, yscale='linear' if 'dB' in label else 'log')
        column[0].set_title(f'{title}: logits {report["logits_snr_db"]:.1f} dB', fontsize=11)
        column[2].tick_params('x', rotation=90, labelsize=7)
        column[2].legend(frameon=False)
    save_figure(figure, folder / 'layers.png')


def layer_sensitivity(done: Quantization) -> dict[str, Any]:
    """Measures a model with one layer at a time in INT8, on its calibration images, which are all in memory.

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
    try:
        check_classes(onnx_classifier(done.model), done.images)
        labelled = True
    except ValueError:
        labelled = False
    batches, targets = zip(*done.images.batches(done.indices, 32, 'sensitivity'))
    labels = torch.cat(targets)

    def logits(model: Any) -> torch.Tensor:
        return torch.cat([*map(onnx_classifier(model).run, batches)]).double()

    def compare(model: Any) -> dict[str, float]:
        found = logits(model)
        right = [(each.argmax(1) == labels).double().mean().item() for each in (expected, found)]
        distance = F.kl_div(found.log_softmax(1), expected.log_softmax(1), reduction='batchmean', log_target=True)
        return {**({'drop': 100 * (right[0] - right[1])} if labelled else {}), 'kl': distance.item()}

    expected = logits(done.model)
    inputs, restored = _inputs(done.quantized)
    rows = []
    for name, node in tqdm(layers_of(done.model).items(), 'sensitivity', unit='layer', disable=None):
        if inputs[node.name][1] in restored:
            following = node.successors()
            # The rounding comes after these, as in the whole model.
            alone = len(following) == 1 and following[0].op_type in ('Relu', 'Clip')
            only = [node.name, *(user.name for user in following if alone)]
            found = compare(quantize(done.model, done.options, done.ranges, only=only)[0])
            rows.append({'layer': name, 'operator': node.op_type, **found})
    rows.sort(key=lambda row: (row.get('drop', 0), row['kl']), reverse=True)
    return {'images': len(labels), 'labelled': labelled, 'int8': compare(done.quantized), 'layers': rows}


def _inputs(quantized: Any) -> tuple[dict[str, Any], set[str]]:
    """Returns the inputs of each node, and the tensors that were in INT8."""
    nodes = quantized.graph.node
    restored = {node.output[0] for node in nodes if node.op_type == 'DequantizeLinear'}
    return {node.name: node.input for node in nodes}, restored


def sensitivity_table(ranking: Mapping[str, Any], most: int | None = None) -> str:
    """Formats what `layer_sensitivity` returned as Markdown, the `most` sensitive layers or all."""
    rows = [{'layer': 'all', 'operator': '', **ranking['int8']}, *ranking['layers'][:most]]
    drop = ['drop'] if ranking['labelled'] else []
    body = [[row['layer'], row['operator'], *(f'{row[name]:.2f}' for name in drop), f'{row["kl"]:.2e}'] for row in rows]
    return markdown_table(['layer in INT8', 'operator', *drop, 'KL'], body, align=True)
