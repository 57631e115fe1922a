"""What INT8 does to a model layer by layer: the noise in weights and activations, and the accuracy each layer costs."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from scipy.stats import kurtosis

from ..plot import save_figure, subplots
from ..reporting import markdown_table
from .classifier import image_input, onnx_classifier
from .evaluation import check_classes
from .onnx_graph import layers_of
from .quantization import Quantization, quantize
from .runtime import quiet, require, save_onnx

__all__ = ['layer_report', 'layer_sensitivity', 'plot_layers', 'plot_sensitivity', 'sensitivity_table']


def layer_report(quantization: Quantization, images: int = 16) -> dict[str, Any]:
    """Compares a model with its quantized form, layer by layer.

    The signal-to-noise ratios are `20 log10(|x| / |x - x'|)` in dB, x being float32 values and x' their
    quantized form. Higher is better; a bit is worth 6 dB.

    Args:
        quantization: What `quantize_onnx` returned.
        images: Number of its calibration images to run; all their activations are in memory, twice.

    Returns:
        Plain data: `options`; `logits_snr_db`; and `layers`, in the order of the network, each with
        `layer`, `operator` and `shape`;
        `min`, `max`, `std` and `kurtosis` (3 for a normal distribution) of its weights, BatchNorm folded in;
        `weight_snr_db`, and `weak_channels_snr_db`, which 5 % of the output channels are below;
        `input_snr_db`, for the noise that rounding this layer's input makes by itself;
        `accumulated_snr_db`, for the noise in this input with everything before quantized too.
        Layers that stayed in float32 have no ratios.
    """
    ratio = require('onnxruntime.quantization.qdq_loss_debug').compute_signal_to_quantization_noice_ratio
    exact, rounded = (
        _activations(quantization, model, images) for model in (quantization.model, quantization.quantized)
    )
    nodes = {node.name: node for node in require('onnx_ir').from_proto(quantization.quantized).graph}
    rows = []
    for name, node in layers_of(quantization.model).items():
        weight = node.inputs[1].const_value.numpy()
        row: dict[str, Any] = {'layer': name, 'operator': node.op_type, 'shape': list(weight.shape)}
        values = weight.astype(np.float64)
        row |= {name: float(getattr(values, name)()) for name in ('min', 'max', 'std')}
        # Undefined for equal weights.
        row['kurtosis'] = float(kurtosis(values, axis=None, fisher=False)) if row['std'] > 0 else 0.0
        rows.append(row)
        restoring = nodes[node.name].inputs[0].producer()
        if restoring is not None and restoring.op_type == 'DequantizeLinear':
            scale, zero = (value.const_value.numpy() for value in restoring.inputs[1:3])
            # ORT's own `qdq_err` counts what a fused ReLU clips as noise.
            limits, parts = np.iinfo(zero.dtype), exact[node.inputs[0].name]
            codes = (np.clip(np.rint(part / scale) + zero, limits.min, limits.max) for part in parts)
            row['input_snr_db'] = ratio(parts, [(code - np.float32(zero)) * scale for code in codes])
            row['accumulated_snr_db'] = ratio(parts, rounded[restoring.outputs[0].name])
        restored = rounded.get(nodes[node.name].inputs[1].name)
        if not restored:
            continue
        axis = {'Conv': 0, 'Gemm': 1 - node.attributes.get_int('transB', 0)}.get(node.op_type, -1)
        pairs = [np.moveaxis(part.reshape(weight.shape), axis, 0) for part in (weight, restored[0])]
        row['weight_snr_db'] = ratio(*pairs)
        # In the sum over all channels, strong ones hide that a common scale rounds weak ones away.
        channels = [ratio(*pair) for pair in zip(*pairs) if pair[0].any()]
        row['weak_channels_snr_db'] = float(np.percentile(channels, 5)) if channels else 0.0
    return {'options': asdict(quantization.options), 'logits_snr_db': quantization.logits_snr_db, 'layers': rows}


def _activations(quantization: Quantization, model: Any, images: int) -> dict[str, list[np.ndarray]]:
    debug = require('onnxruntime.quantization.qdq_loss_debug')
    name, (fixed, *_) = image_input(quantization.model)
    batches = quantization.images.batches(quantization.indices[:images], fixed or images, 'report', whole=fixed > 0)
    with TemporaryDirectory(prefix='repopt-timm-') as folder, quiet():
        source, augmented = Path(folder, 'model.onnx'), Path(folder, 'augmented.onnx')
        save_onnx(model, source)
        debug.modify_model_output_intermediate_tensors(source, augmented)
        return debug.collect_activations(os.fspath(augmented), ({name: batch.numpy()} for batch, _ in batches))


def plot_layers(reports: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draws reports side by side, on the same axes.

    Args:
        reports: Title to what `layer_report` returned.
        path: Picture to write, in the format that its suffix names.

    Raises:
        ImportError: If matplotlib is not installed.
        OSError: If the picture cannot be written.
    """
    curves = (
        (0, 'max', 'largest |w|', 'tab:blue', '^-'),
        (0, 'std', 'standard\ndeviation', 'tab:orange', 'o-'),
        (1, 'kurtosis', 'kurtosis', 'tab:purple', 'o-'),
        (2, 'weight_snr_db', 'weights', 'tab:blue', 's-'),
        (2, 'weak_channels_snr_db', 'weights, the weakest\n5 % of channels', 'tab:blue', ':'),
        (2, 'input_snr_db', "layer's input,\nrounded alone", 'tab:green', 'o-'),
        (2, 'accumulated_snr_db', "layer's input,\nall before it too", 'tab:red', 'v-'),
    )
    size = 6.5 * len(reports) + 1.5, 9.5
    figure, grid = subplots(3, len(reports), size, layout='constrained', sharey='row', sharex='col', squeeze=False)
    for column, (title, report) in zip(grid.T, reports.items()):
        rows, options = report['layers'], report['options']
        for place, key, label, color, form in curves:
            # Layers in float32 leave a gap.
            values = [max(row['max'], -row['min']) if key == 'max' else row.get(key, np.nan) for row in rows]
            column[place].plot(values, form, color=color, ms=4, label=label)
        settings = f'{options["weights"]} weights, {options["calibration"]} calibration'
        column[0].set_title(f'{title}\n{settings}: logits {report["logits_snr_db"]:.1f} dB', fontsize=11)
        column[1].axhline(3, color='0.5', lw=1, ls='--', label='normal\ndistribution')
        places = range(0, len(rows), -(-len(rows) // 40))
        column[2].set_xticks(places, [rows[place]['layer'] for place in places], rotation=90, fontsize=7)
    parts = (('size of weights', 'log'), ('kurtosis of weights', 'log'), ('signal to noise (dB)', 'linear'))
    for line, (label, scale) in zip(grid, parts):
        line[0].set(ylabel=label, yscale=scale)
        line[-1].legend(frameon=False, loc='center left', bbox_to_anchor=(1, 0.5), fontsize=9)
    save_figure(figure, path)


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
        lost = (expected.argmax(1) == labels).double().mean() - (found.argmax(1) == labels).double().mean()
        distance = F.kl_div(found.log_softmax(1), expected.log_softmax(1), reduction='batchmean', log_target=True)
        return {**({'drop': 100 * lost.item()} if labelled else {}), 'kl': distance.item()}

    expected = logits(done.model)
    nodes = {node.name: node for node in done.quantized.graph.node}
    roundings = {node.output[0] for node in nodes.values() if node.op_type == 'DequantizeLinear'}
    rows = []
    for name, node in tqdm(layers_of(done.model).items(), 'sensitivity', unit='layer', disable=None):
        if roundings.intersection(nodes[node.name].input[1:2]):
            following = node.successors()
            # The rounding comes after these, as in the whole model.
            alone = len(following) == 1 and following[0].op_type in ('Relu', 'Clip')
            only = [node.name, *(user.name for user in following if alone)]
            found = compare(quantize(done.model, done.ranges, done.options, only))
            rows.append({'layer': name, 'operator': node.op_type, **found})
    rows.sort(key=lambda row: (row.get('drop', 0), row['kl']), reverse=True)
    return {'images': len(labels), 'labelled': labelled, 'int8': compare(done.quantized), 'layers': rows}


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
        axes.barh([row['layer'] for row in rows], [row[name] for row in rows], color='tab:blue', height=0.7)
        axes.axvline(report['int8'][name], color='tab:red', lw=1, label='all layers')
        axes.set_xlabel(label)
        axes.legend(frameon=False, loc='lower right')
    if report['int8']['kl'] > 0:
        panels[-1].set_xscale('log')
    panels[0].tick_params('y', labelsize=7)
    panels[0].invert_yaxis()
    figure.suptitle(f'One layer in INT8 at a time, {report["images"]} calibration images', fontsize=11)
    save_figure(figure, path)
