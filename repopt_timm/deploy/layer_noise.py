"""`quantize --report`: distribution of the weights and quantization noise, layer by layer."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy.stats import kurtosis

from ..plot import save_figure, subplots
from .classifier import image_input
from .onnx_graph import layers_of
from .quantization import Quantization
from .runtime import quiet, require, save_onnx

__all__ = ['layer_report', 'plot_layers']


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
    exact = _activations(quantization, quantization.model, images)
    rounded = _activations(quantization, quantization.quantized, images)
    nodes = {node.name: node for node in require('onnx_ir').from_proto(quantization.quantized).graph}
    rows = []
    for name, node in layers_of(quantization.model).items():
        weight = node.inputs[1].const_value.numpy()
        row = {'layer': name, 'operator': node.op_type, 'shape': list(weight.shape), **_moments(weight)}
        restoring = nodes[node.name].inputs[0].producer()
        if restoring is not None and restoring.op_type == 'DequantizeLinear':
            scale, zero = (value.const_value.numpy() for value in restoring.inputs[1:3])
            limits, values = np.iinfo(zero.dtype), exact[node.inputs[0].name]
            codes = [np.clip(np.rint(part / scale) + zero, limits.min, limits.max) for part in values]
            row['input_snr_db'] = ratio(values, [(part - np.float32(zero)) * scale for part in codes])
            row['accumulated_snr_db'] = ratio(values, rounded[restoring.outputs[0].name])
        restored = rounded.get(nodes[node.name].inputs[1].name)
        if restored:
            axis = {'Conv': 0, 'Gemm': 1 - node.attributes.get_int('transB', 0)}.get(node.op_type, -1)
            pairs = [np.moveaxis(part.reshape(weight.shape), axis, 0) for part in (weight, restored[0])]
            row['weight_snr_db'] = ratio(*pairs)
            # In the sum over all channels, strong ones hide that a common scale rounds weak ones away.
            channels = [ratio(*pair) for pair in zip(*pairs) if pair[0].any()]
            row['weak_channels_snr_db'] = float(np.percentile(channels, 5)) if channels else 0.0
        rows.append(row)
    return {
        'options': asdict(quantization.options),
        'logits_snr_db': quantization.logits_snr_db,
        'layers': rows,
    }


def _activations(quantization: Quantization, model: Any, images: int) -> dict[str, list[np.ndarray]]:
    debug = require('onnxruntime.quantization.qdq_loss_debug')
    name, (fixed, *_) = image_input(quantization.model)
    batches = quantization.images.batches(quantization.indices[:images], fixed or images, 'report', whole=fixed > 0)
    with TemporaryDirectory(prefix='repopt-timm-') as folder, quiet():
        source, augmented = Path(folder, 'model.onnx'), Path(folder, 'augmented.onnx')
        save_onnx(model, source)
        debug.modify_model_output_intermediate_tensors(source, augmented)
        return debug.collect_activations(os.fspath(augmented), ({name: batch.numpy()} for batch, _ in batches))


def _moments(weight: np.ndarray) -> dict[str, float]:
    values = weight.astype(np.float64).reshape(-1)
    spread = values.std()
    return {
        'min': float(values.min()),
        'max': float(values.max()),
        'std': float(spread),
        # Undefined for equal weights.
        'kurtosis': float(kurtosis(values, fisher=False)) if spread > 0 else 0.0,
    }


def plot_layers(reports: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draws reports side by side, on the same axes.

    Args:
        reports: Title to what `layer_report` returned.
        path: Picture to write, in the format that its suffix names.

    Raises:
        ImportError: If matplotlib is not installed.
        OSError: If the picture cannot be written.
    """
    size = 6.5 * len(reports) + 1.5, 9.5
    figure, grid = subplots(3, len(reports), size, layout='constrained', sharey='row', sharex='col', squeeze=False)
    for column, (title, report) in zip(grid.T, reports.items()):
        _draw(column, title, report)
    for axes, label in zip(grid[:, 0], ('size of weights', 'kurtosis of weights', 'signal to noise (dB)')):
        axes.set_ylabel(label)
    for row in grid:
        row[-1].legend(frameon=False, loc='center left', bbox_to_anchor=(1, 0.5), fontsize=9)
    save_figure(figure, path)


def _draw(axes: Sequence[Any], title: str, report: Mapping[str, Any]) -> None:
    rows, options = report['layers'], report['options']
    depths = range(len(rows))
    weights, tails, noise = axes

    largest = [max(abs(row['min']), abs(row['max'])) for row in rows]
    weights.plot(depths, largest, color='tab:blue', marker='^', ms=4, label='largest |w|')
    weights.plot(
        depths, [row['std'] for row in rows], color='tab:orange', marker='o', ms=4, label='standard\ndeviation'
    )
    settings = f'{options["weights"]} weights, {options["calibration"]} calibration'
    weights.set_title(f'{title}\n{settings}: logits {report["logits_snr_db"]:.1f} dB', fontsize=11)
    tails.plot(depths, [row['kurtosis'] for row in rows], color='tab:purple', marker='o', ms=4, label='kurtosis')
    tails.axhline(3, color='0.5', lw=1, ls='--', label='normal\ndistribution')
    for key, label, style in (
        ('weight_snr_db', 'weights', {'color': 'tab:blue', 'marker': 's'}),
        ('weak_channels_snr_db', 'weights, the weakest\n5 % of channels', {'color': 'tab:blue', 'ls': ':'}),
        ('input_snr_db', "layer's input,\nrounded alone", {'color': 'tab:green', 'marker': 'o'}),
        ('accumulated_snr_db', "layer's input,\nall before it too", {'color': 'tab:red', 'marker': 'v'}),
    ):
        # Layers in float32 leave a gap.
        noise.plot(depths, [row.get(key, np.nan) for row in rows], ms=4, label=label, **style)
    for part in (weights, tails):
        part.set_yscale('log')
    step = -(-len(rows) // 40)
    noise.set_xticks(list(depths)[::step], [row['layer'] for row in rows][::step], rotation=90, fontsize=7)
    for part in axes:
        part.grid(axis='y', color='0.9')
