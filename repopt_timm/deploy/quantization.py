"""Static 8-bit quantization with ONNX Runtime: calibration on images, then a model in QDQ format."""

import fnmatch
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..datasets import Images, open_evaluation
from .channel_health import constant_inputs, health_warnings, kernel_outliers
from .classifier import image_input, logits_of, onnx_classifier
from .equalization import Equalization, equalize
from .onnx_export import float_onnx
from .onnx_graph import LAYERS, layers_of
from .runtime import explained, quiet, require, save_onnx

__all__ = [
    'CALIBRATIONS',
    'TARGETS',
    'WEIGHTS',
    'Quantization',
    'QuantizationOptions',
    'calibrate',
    'draw',
    'quantize',
    'quantize_onnx',
]

WEIGHTS = ('per-channel', 'per-tensor')
CALIBRATIONS = ('minmax', 'entropy', 'percentile')
TARGETS = ('ort', 'tensorrt')

# Images whose activations are in memory at a time: 60 MB each in RepOpt-VGG-B1 at 224 px.
_BATCH = 8

# Below either of these INT8 is said to have damaged the model.
_AGREEMENT = 95.0
_DECIBELS = 10.0

# TensorRT fuses what follows a layer into it if no rounding stands between, and takes symmetric ranges only.
_TENSORRT = {
    'ActivationSymmetric': True,
    'AddQDQPairToWeight': True,
    'DedicatedQDQPair': True,
    'OpTypesToExcludeOutputQuantization': list(LAYERS),
    'QuantizeBias': False,
}


@dataclass(frozen=True)
class QuantizationOptions:
    """How to quantize.

    Weights become signed 8-bit integers. For `ort` activations become unsigned ones, the pair that x86 has dot-product
    instructions for (VNNI). For `tensorrt` they are signed, with zero points of 0, rounded before each layer by a pair
    of nodes of its own; biases stay in float32, and so do weights in the file, followed by a pair of nodes. The logits
    stay in float32 as the last layer gives them.

    Attributes:
        weights: One scale `per-channel` or `per-tensor`.
        calibration: How ranges of activations are found: `minmax`, `entropy` or `percentile`; or `auto`, the one of
            these with the best agreement on images that calibrated nothing.
        percentile: Share of an activation's values that its range covers, in percent, for `percentile`.
        images: Number of images to calibrate on.
        seed: Seed of the draw.
        reduce_range: Use 7 bits for weights: without VNNI, x86 adds up pairs of products in 16 bits, which overflow.
        exclude: Layers to leave in float32: names, with `*`, or operators. Layers at either end, or at least two
            adjacent ones.
        target: What the file is for: `ort`, also for OpenVINO, or `tensorrt`.
        equalize: Remove dead channels and equalize layers first, see `equalization`.
    """

    weights: str = 'per-channel'
    calibration: str = 'minmax'
    percentile: float = 99.99
    images: int = 512
    seed: int = 0
    reduce_range: bool = False
    exclude: tuple[str, ...] = ()
    target: str = 'ort'
    equalize: bool = False

    def __post_init__(self) -> None:
        known = {'weights': WEIGHTS, 'target': TARGETS, 'calibration': (*CALIBRATIONS, 'auto')}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}='{getattr(self, name)}': expected one of {', '.join(values)}.")
        if not 50 < self.percentile <= 100:
            raise ValueError(f'percentile={self.percentile}: expected more than 50 and at most 100.')


@dataclass(frozen=True)
class Quantization:
    """A model before and after quantizing, and how close they are.

    Attributes:
        model: The float `onnx.ModelProto`.
        quantized: The same in QDQ format.
        images: Where calibration images came from.
        indices: Which these were.
        options: How it was quantized.
        tried: Calibrations that were tried, `options` having the best.
        ranges: What `calibrate` found on them.
        dead: Layer to the number of its input channels that never changed on these images.
        equalization: What equalizing did to the float model, if it was asked for.
        judged: The images that both were compared on: as many others, or the same if the folder has no others.
        agreement: Percentage of these for which both choose the same class.
        logits_snr_db: Signal to noise of the logits on these, `20 log10(|x| / |x - x'|)`.
    """

    model: Any
    quantized: Any
    images: Images
    indices: Sequence[int]
    options: QuantizationOptions
    tried: Sequence[str]
    ranges: bytes
    dead: Mapping[str, int]
    equalization: Equalization | None
    judged: Sequence[int]
    agreement: float
    logits_snr_db: float

    def warnings(self) -> list[str]:
        """Returns a line for each problem: dead channels, outliers in kernels, a result unlike the model."""
        lines = health_warnings({} if self.equalization else self.dead, kernel_outliers(self.model), len(self.indices))
        if self.agreement >= _AGREEMENT and self.logits_snr_db >= _DECIBELS:
            return lines
        steps = {
            '--calibration auto': len(self.tried) < len(CALIBRATIONS),
            '--equalize': not self.equalization,
            '--weights per-channel': self.options.weights != 'per-channel',
        }
        advice = ', '.join(step for step, untried in steps.items() if untried)
        return [
            *lines,
            f'INT8 changes this model: {self.agreement:.1f} % of {len(self.judged)} images are classified as before, '
            f'logits {self.logits_snr_db:.1f} dB above the noise; expected {_AGREEMENT:.0f} % and {_DECIBELS:.0f} dB. '
            + (f'Try {advice}; then ' if advice else '')
            + 'see which layers cost most with --sensitivity, and --exclude them.',
        ]


def quantize_onnx(
    source: str | os.PathLike,
    data: str | os.PathLike,
    options: QuantizationOptions | None = None,
    split: str = 'train',
    overrides: Mapping[str, Any] | None = None,
    class_map: str = '',
) -> Quantization:
    """Quantizes a trained model; `save_onnx` writes the result.

    Args:
        source: An `.onnx` file, or what `load_model` takes.
        data: Image folder to calibrate on, see `open_split`.
        options: See there.
        split: Split of `data` to draw from: images that the model will not be judged by.
        overrides: Preprocessing that differs from the model's own, by timm's names.
        class_map: See `open_split`; the one that the model was trained with. Only `layer_sensitivity` looks at labels.

    Raises:
        FileNotFoundError: If there is no such model or folder.
        ValueError: If the folder has no images, one does not decode, or the model cannot be quantized.
        ImportError: If the `[deploy]` extra is not installed.
    """
    options = options or QuantizationOptions()
    model = float_onnx(source, overrides)
    classifier = onnx_classifier(model, overrides=overrides)
    images = open_evaluation(data, split, classifier.config, class_map, classifier.class_names)
    indices, others = draw(images, options)
    if options.calibration == 'auto' and not others:
        raise ValueError(
            f'--calibration auto compares on images that calibrated nothing, but all {len(images)} of '
            f"'{images.folder}' calibrate. Lower --images."
        )
    # Before the work.
    _excluded_nodes(model, options.exclude)
    dead, equalization = {}, None
    if options.equalize:
        equalization = equalize(model, images, [*indices, *others[: len(indices)]], others[len(indices) :])
        model = equalization.model
    else:
        for layer, values in constant_inputs(model, images, indices).items():
            if count := int((~np.isnan(values)).sum()):
                dead[layer] = count
    judged = others[: len(indices)] or indices
    tried = CALIBRATIONS if options.calibration == 'auto' else (options.calibration,)
    signal_to_noise = require('onnxruntime.quantization.qdq_loss_debug').compute_signal_to_quantization_noice_ratio
    found = []
    for calibration in tried:
        options = replace(options, calibration=calibration)
        ranges = calibrate(model, images, indices, options)
        quantized = quantize(model, ranges, options)
        exact, rounded = logits_of((model, quantized), images, judged, 'agreement')
        agreement = 100 * (exact.argmax(1) == rounded.argmax(1)).float().mean().item()
        decibels = signal_to_noise(exact.numpy(), rounded.numpy())
        known = model, quantized, images, indices, options, tried, ranges, dead, equalization, judged
        found.append(Quantization(*known, agreement, decibels))
    return max(found, key=lambda done: (done.agreement, done.logits_snr_db))


def draw(images: Images, options: QuantizationOptions) -> tuple[list[int], list[int]]:
    """Draws the images to calibrate on, and all others in random order."""
    first = images.sample(options.images, options.seed)
    chosen = set(first)
    return first, [index for index in images.sample(len(images), options.seed + 1) if index not in chosen]


def calibrate(model: Any, images: Images, indices: Sequence[int], options: QuantizationOptions) -> bytes:
    """Finds the ranges of a model's activations.

    Args:
        model: A float `onnx.ModelProto`.
        images: Where images come from.
        indices: Those to calibrate on.
        options: See there; `weights`, `reduce_range`, `exclude` and `target` do not matter here.

    Returns:
        ONNX Runtime's calibration cache: the lowest and highest value of each tensor.

    Raises:
        ValueError: If an image does not decode, or ONNX Runtime cannot run the model.
        OSError: If there is no room for temporary files.
    """
    return _quantize_static(model, options, feeds=_Feeds(model, images, indices, options.calibration))[1]


def quantize(model: Any, ranges: bytes, options: QuantizationOptions, only: Sequence[str] = ()) -> Any:
    """Quantizes a model.

    Args:
        model: A float `onnx.ModelProto`, which stays as it is.
        ranges: What `calibrate` returned for it, with the same `calibration`.
        options: See there.
        only: Names of the nodes to quantize, whether or not ONNX Runtime leaves the others in float32. Defaults to all
            that `exclude` leaves.

    Returns:
        An `onnx.ModelProto` in QDQ format.

    Raises:
        ValueError: If the model is quantized already, `exclude` matches none of its layers, or names a single one
            between others.
    """
    excluded = {} if only else _excluded_nodes(model, options.exclude)
    quantized = _quantize_static(model, options, ranges, only=only, exclude=excluded.values())[0]
    if options.target == 'ort':
        _refuse_single_layers(model, quantized, excluded)
    return quantized


def _quantize_static(
    model: Any,
    options: QuantizationOptions,
    ranges: bytes = b'',
    feeds: '_Feeds | None' = None,
    only: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> tuple[Any, bytes]:
    """Calls ONNX Runtime with `ranges`, or with `feeds` to find them; returns the model and the ranges."""
    quantization = require('onnxruntime.quantization')
    method = {'minmax': 'MinMax', 'entropy': 'Entropy', 'percentile': 'Percentile'}[options.calibration]
    exclude = list(exclude)
    extra: dict[str, Any] = {'CalibStridedMinMax': 1, 'CalibPercentile': options.percentile}
    if options.target == 'tensorrt':
        extra |= _TENSORRT
        exclude += [node.name for node in model.graph.node if node.op_type not in LAYERS]
    with TemporaryDirectory(prefix='repopt-timm-') as folder, quiet():
        # Of a model in memory ONNX Runtime moves the weights to a file.
        source, result, cache = (Path(folder, name) for name in ('model.onnx', 'int8.onnx', 'ranges.json'))
        save_onnx(model, source)
        if ranges:
            cache.write_bytes(ranges)
        with explained('ONNX Runtime cannot quantize the model'):
            quantization.quantize_static(
                source,
                result,
                feeds,
                per_channel=options.weights == 'per-channel',
                reduce_range=options.reduce_range,
                activation_type=getattr(quantization.QuantType, 'QInt8' if options.target == 'tensorrt' else 'QUInt8'),
                nodes_to_quantize=list(only),
                nodes_to_exclude=exclude,
                calibrate_method=getattr(quantization.CalibrationMethod, method),
                calibration_cache_path=cache,
                extra_options=extra,
            )
            quantized = _finish(require('onnx').load(result), options.target)
            # Without notes of ONNX Runtime that are no JSON.
            del quantized.metadata_props[:]
            quantized.metadata_props.extend(model.metadata_props)
            return quantized, cache.read_bytes()


class _Feeds:
    """Gives ONNX Runtime one batch after another.

    Its calibrators keep all activations until a call ends. A stride of one batch makes that a call for each batch, for
    each calibration; `CalibMaxIntermediateOutputs` of ONNX Runtime 1.32 drops the batches instead of merging them.
    """

    def __init__(self, model: Any, images: Images, indices: Sequence[int], title: str):
        self._name, (fixed, *_) = image_input(model)
        size = fixed or _BATCH
        self._count = -(-len(indices) // size)
        self._batches = images.batches(indices, size, f'{title} calibration', whole=fixed > 0)
        self._turn: Iterator[Any] = iter(())

    def __len__(self) -> int:
        return self._count

    def set_range(self, start_index: int, end_index: int) -> None:
        self._turn = islice(self._batches, end_index - start_index)

    def get_next(self) -> dict[str, np.ndarray] | None:
        found = next(self._turn, None)
        return None if found is None else {self._name: found[0].numpy()}


def _finish(quantized: Any, target: str) -> Any:
    """Leaves the logits, and for TensorRT what other operators read, in float."""
    ir = require('onnx_ir')
    model = ir.from_proto(quantized)
    for node in model.graph:
        rounding = node.inputs[0].producer() if node.op_type == 'DequantizeLinear' else None
        if rounding is None:
            continue
        before, after = rounding.inputs[0], node.outputs[0]
        if after.is_graph_output():
            before.name, before.type, before.shape = after.name, after.type, after.shape
            after.name = None
            after.replace_all_uses_with(before, replace_graph_outputs=True)
        elif target == 'tensorrt':
            # ONNX Runtime lets a residual that reads a layer's input read its rounded form too.
            for user, place in [use for use in after.uses() if use.node.op_type not in LAYERS]:
                user.replace_input_with(place, before)
    require('onnx_ir.passes.common').RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


def _excluded_nodes(model: Any, patterns: Iterable[str]) -> dict[str, str]:
    """Maps excluded layers, and other nodes, to names of nodes; refuses a model that is not in float32."""
    if any(node.op_type in ('QuantizeLinear', 'DequantizeLinear') for node in model.graph.node):
        raise ValueError('The model is quantized already; name the float32 one.')
    if any(tensor.data_type == tensor.FLOAT16 for tensor in model.graph.initializer):
        raise ValueError('The model is in float16, expected float32; name the file of an export without --fp16.')
    layers = layers_of(model)
    excluded: dict[str, str] = {}
    for pattern in patterns:
        found = {name: node.name for name, node in layers.items() if fnmatch.fnmatchcase(name, pattern)}
        found |= {node.name: node.name for node in model.graph.node if node.op_type == pattern}
        if not found:
            known = ', '.join([*islice(layers, 8), *(['...'] if len(layers) > 8 else [])])
            raise ValueError(f"exclude '{pattern}': no layer or operator has this name, expected one of {known}.")
        excluded |= found
    return excluded


def _refuse_single_layers(model: Any, quantized: Any, excluded: Mapping[str, str]) -> None:
    """Raises a ValueError if ONNX Runtime quantizes an excluded layer when it loads the file."""
    layers = {node.name: layer for layer, node in layers_of(model).items()}
    nodes = {node.name: node for node in require('onnx_ir').from_proto(quantized).graph}
    for layer, name in excluded.items():
        node: Any = nodes.get(name)
        before = node.inputs[0].producer() if node and node.op_type in ('Conv', 'ConvTranspose', 'Gemm') else None
        if before is None or before.op_type != 'DequantizeLinear':
            continue
        following = list(node.successors())
        # ONNX Runtime fuses these into the rounding.
        while len(following) == 1 and following[0].op_type in ('Relu', 'Clip'):
            following = list(following[0].successors())
        if any(user.op_type == 'QuantizeLinear' for user in following):
            for user in following:
                following += [] if user.name in layers else user.successors()
            more = [f"'{layers[user.name]}'" for user in following if user.name in layers][:1] or ['a layer next to it']
            raise ValueError(
                f"'{layer}' alone cannot stay in float32: ONNX Runtime quantizes a layer between two quantized ones, "
                f"one scale for all channels, when it loads the file. Exclude '{layer}' and {more[0]}."
            )
