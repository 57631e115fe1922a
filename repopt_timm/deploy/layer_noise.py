"""`quantize --report`: distribution of the weights and quantization noise, layer by layer."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..plot import save_figure, subplots
from .classifier import image_input
from .onnx_graph import constants_of, layers_of, with_outputs
from .quantization import Quantization
from .runtime import open_session

__all__ = ['layer_report', 'plot_layers']

_BATCH = 8


def layer_report(quantization: Quantization, images: int = 64) -> dict[str, Any]:
    """Compares a model with its quantized form, layer by layer.

    The signal-to-noise ratios are `20 log10(|x| / |x - x'|)` in dB, x being float32 values and x' their
    quantized form. Higher is better; a bit is worth 6 dB.

    Args:
        quantization: What `quantize_onnx` returned.
        images: Number of its calibration images to run.

    Returns:
        Plain data: `options`; `logits_snr_db`; and `layers`, in the order of the network, each with
        `layer`, `operator` and `shape`;
        `min`, `max`, `std` and `kurtosis` (3 for a normal distribution) of its weights, BatchNorm folded in;
        `weight_snr_db`, and `weak_channels_snr_db`, which 5 % of the output channels are below;
        `input_snr_db`, for the noise that rounding this layer's input makes by itself;
        `accumulated_snr_db`, for the noise in this input with everything before quantized too.
        Layers that stayed in float32 have no ratios.
    """
    model, graph = quantization.model, _QuantizedGraph(quantization.quantized)
    layers, constants = layers_of(model), constants_of(model)
    rounded = {name: graph.input(node.name) for name, node in layers.items()}
    quantizers = {layers[name].input[0]: quantizer for name, quantizer in rounded.items() if quantizer is not None}
    alone, accumulated, logits = _activation_noise(quantization, quantizers, images)
    rows = []
    for name, node in layers.items():
        weight, restored = constants[node.input[1]], graph.weight(node.name)
        row = {'layer': name, 'operator': node.op_type, 'shape': list(weight.shape), **_moments(weight)}
        if restored is not None:
            row['weight_snr_db'] = _Noise().add(weight, restored).decibels
            row['weak_channels_snr_db'] = _weak_channels(weight, restored, _channel_axis(node))
        if rounded[name] is not None:
            tensor = node.input[0]
            row |= {'input_snr_db': alone[tensor].decibels, 'accumulated_snr_db': accumulated[tensor].decibels}
        rows.append(row)
    return {'options': asdict(quantization.options), 'logits_snr_db': logits.decibels, 'layers': rows}


@dataclass(frozen=True)
class _Quantizer:
    """Scale and zero point, scalars or of the shape of what they belong to, and the name of the rounded tensor."""

    scale: np.ndarray
    zero: np.ndarray
    output: str

    def restore(self, codes: np.ndarray) -> np.ndarray:
        return (codes.astype(np.float32) - self.zero.astype(np.float32)) * self.scale

    def round(self, values: np.ndarray) -> np.ndarray:
        limits = np.iinfo(self.zero.dtype)
        return self.restore(np.clip(np.rint(values / self.scale) + self.zero, limits.min, limits.max))


class _QuantizedGraph:
    """Looks up the inputs of nodes in a model in QDQ format."""

    def __init__(self, quantized: Any):
        self._constants = constants_of(quantized)
        self._nodes = {node.name: node for node in quantized.graph.node}
        self._producers = {node.output[0]: node for node in quantized.graph.node}

    def input(self, node: str) -> _Quantizer | None:
        """Returns the quantizer of a node's input, or None if it is float32."""
        return self._quantizer(self._nodes[node].input[0])

    def weight(self, node: str) -> np.ndarray | None:
        """Returns the values that a node's quantized weights stand for, or None if they are float32."""
        name = self._nodes[node].input[1]
        quantizer = self._quantizer(name)
        if quantizer is None:
            return None
        stored = self._stored(self._producers[name])
        return quantizer.round(stored) if stored.dtype == np.float32 else quantizer.restore(stored)

    def _stored(self, node: Any) -> np.ndarray:
        # TensorRT's form stores float32 weights, and rounds them when it runs.
        rounding = self._producers.get(node.input[0], node)
        return self._constants[rounding.input[0]]

    def _quantizer(self, tensor: str) -> _Quantizer | None:
        producer = self._producers.get(tensor)
        if producer is None or producer.op_type != 'DequantizeLinear':
            return None
        scale, zero = (self._constants[name] for name in producer.input[1:])
        if scale.ndim:
            axis = next(attribute.i for attribute in producer.attribute if attribute.name == 'axis')
            shape = [1] * self._stored(producer).ndim
            shape[axis] = -1
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        return _Quantizer(scale, zero, tensor)


class _Noise:
    """Sums up signal and noise over batches."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def add(self, values: np.ndarray, noisy: np.ndarray) -> '_Noise':
        self._signal += float(np.square(values, dtype=np.float64).sum())
        self._noise += float(np.square(values - noisy, dtype=np.float64).sum())
        return self

    @property
    def decibels(self) -> float:
        # JSON has no infinity.
        tiny = np.finfo(np.float64).tiny
        return float(10 * np.log10(max(self._signal, tiny) / max(self._noise, tiny)))


def _activation_noise(
    quantization: Quantization, quantizers: Mapping[str, _Quantizer], images: int
) -> tuple[dict[str, _Noise], dict[str, _Noise], _Noise]:
    """Measures the noise in activations, by the float model's names: each rounded alone, all rounded, in the logits."""
    alone, accumulated = {name: _Noise() for name in quantizers}, {name: _Noise() for name in quantizers}
    logits = _Noise()
    model, quantized = quantization.model, quantization.quantized
    output, (image, (fixed, *_)) = model.graph.output[0].name, image_input(model)
    rounded_names = [quantizer.output for quantizer in quantizers.values()]
    # The optimizer would fuse the requested tensors away.
    exact_session = open_session(with_outputs(model, quantizers), optimize=False)
    rounded_session = open_session(with_outputs(quantized, rounded_names), optimize=False)
    indices = quantization.indices[:images]
    for batch, _ in quantization.images.batches(indices, fixed or _BATCH, 'report', whole=fixed > 0):
        feed = {image: batch.numpy()}
        expected, *exact = exact_session.run([output, *quantizers], feed)
        found, *rounded = rounded_session.run([output, *rounded_names], feed)
        logits.add(expected, found)
        for (name, quantizer), values, noisy in zip(quantizers.items(), exact, rounded):
            alone[name].add(values, quantizer.round(values))
            accumulated[name].add(values, noisy)
    return alone, accumulated, logits


def _channel_axis(node: Any) -> int:
    if node.op_type == 'Gemm':
        return 0 if any(attribute.name == 'transB' and attribute.i for attribute in node.attribute) else 1
    return {'Conv': 0, 'ConvTranspose': 1}.get(node.op_type, -1)


def _weak_channels(weight: np.ndarray, restored: np.ndarray, axis: int) -> float:
    # In the sum over all channels, strong ones hide that a common scale rounds weak ones away.
    channels = zip(np.moveaxis(weight, axis, 0), np.moveaxis(restored, axis, 0))
    levels = [_Noise().add(*channel).decibels for channel in channels if channel[0].any()]
    return float(np.percentile(levels, 5)) if levels else 0.0


def _moments(weight: np.ndarray) -> dict[str, float]:
    centred = weight.astype(np.float64) - weight.mean(dtype=np.float64)
    variance = np.square(centred).mean()
    return {
        'min': float(weight.min()),
        'max': float(weight.max()),
        'std': float(np.sqrt(variance)),
        # Undefined for equal weights.
        'kurtosis': float((centred**4).mean() / variance**2) if variance > 0 else 0.0,
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
    rows = report['layers']
    depths = range(len(rows))
    options = report['options']
    weights, kurtosis, noise = axes

    largest = [max(abs(row['min']), abs(row['max'])) for row in rows]
    deviation = [row['std'] for row in rows]
    weights.fill_between(depths, deviation, largest, color='tab:blue', alpha=0.15, lw=0)
    weights.plot(depths, largest, color='tab:blue', marker='^', ms=4, label='largest |w|')
    weights.plot(depths, deviation, color='tab:orange', marker='o', ms=4, label='standard\ndeviation')
    weights.set_yscale('log')
    settings = f'{options["weights"]} weights, {options["calibration"]} calibration'
    weights.set_title(f'{title}\n{settings}: logits {report["logits_snr_db"]:.1f} dB', fontsize=11)

    kurtosis.plot(depths, [row['kurtosis'] for row in rows], color='tab:purple', marker='o', ms=4, label='kurtosis')
    kurtosis.axhline(3, color='0.5', lw=1, ls='--', label='normal\ndistribution')
    kurtosis.set_yscale('log')

    for key, label, style in (
        ('weight_snr_db', 'weights', {'color': 'tab:blue', 'marker': 's'}),
        ('weak_channels_snr_db', 'weights, the weakest\n5 % of channels', {'color': 'tab:blue', 'ls': ':'}),
        ('input_snr_db', "layer's input,\nrounded alone", {'color': 'tab:green', 'marker': 'o'}),
        ('accumulated_snr_db', "layer's input,\nall before it too", {'color': 'tab:red', 'marker': 'v'}),
    ):
        # Layers in float32 leave a gap.
        noise.plot(depths, [row.get(key, np.nan) for row in rows], ms=4, label=label, **style)
    step = -(-len(rows) // 40)
    noise.set_xticks(list(depths)[::step], [row['layer'] for row in rows][::step], rotation=90, fontsize=7)
    for part in axes:
        part.grid(axis='y', color='0.9')
        part.set_axisbelow(True)
        part.margins(x=0.02)
