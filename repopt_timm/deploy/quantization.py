"""Static 8-bit quantization with ONNX Runtime: calibration on images, then a model in QDQ format."""

import fnmatch
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..datasets import Images, open_evaluation
from ..reporting import lacks_vnni
from .channel_health import constant_inputs, counted, health_warnings, kernel_outliers
from .classifier import OVERFLOW, logits_of, onnx_classifier
from .equalization import Equalization, equalize
from .onnx_export import float_onnx
from .onnx_graph import BATCH, LAYERS, feeds, image_input, layers_of
from .runtime import quiet, require, save_onnx

WEIGHTS = ('per-channel', 'per-tensor')
# With ONNX Runtime's names for them.
CALIBRATIONS = {'minmax': 'MinMax', 'entropy': 'Entropy', 'percentile': 'Percentile'}
TARGETS = ('ort', 'tensorrt')

# Below either, warn that INT8 changes the model.
_AGREEMENT = 95.0
_DECIBELS = 10.0

# Most images, besides the calibration images, on which dead channels are checked. Some channels wake up on one image in
# tens of thousands: to read all images of a large data set for them would take hours.
_MOST_OTHERS = 4096

# Share of an activation's values that its range covers, in percent, for `percentile`.
PERCENTILE = 99.99

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

    Weights become signed 8-bit integers. For `ort` activations become unsigned ones. For `tensorrt` they are signed,
    with zero points of 0, rounded before each layer by a pair of nodes of its own; biases stay in float32, and so do
    weights in the file, followed by a pair of nodes. The logits stay in float32.

    Attributes:
        weights: One scale `per-channel` or `per-tensor`.
        calibration: How ranges of activations are found: `minmax`, `entropy` or `percentile`; or `auto`, the one of
            these with the best agreement on images that calibrated nothing.
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


@dataclass(frozen=True)
class Quantization:
    """A model before and after quantizing, and how close they are.

    Attributes:
        model: The float `onnx.ModelProto`.
        quantized: The same in QDQ format.
        images: The folder.
        indices: Its images that calibrated.
        options: How it was quantized, with the best calibration in place of `auto`.
        ranges: ONNX Runtime's calibration cache.
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
    ranges: bytes
    equalization: Equalization | None
    judged: Sequence[int]
    agreement: float
    logits_snr_db: float

    @cached_property
    def dead(self) -> dict[str, int]:
        """Layer to the number of its input channels that never changed on these images; none if equalized."""
        if self.equalization:
            return {}
        values = constant_inputs(self.model, self.images, self.indices)
        return counted({layer: np.isfinite(constants).sum() for layer, constants in values.items()})

    def warnings(self) -> list[str]:
        """Returns a line for each problem: dead channels, outliers in kernels, a result unlike the model."""
        lines = health_warnings(self.dead, kernel_outliers(self.model), {}, len(self.indices), self.options.equalize)
        if lacks_vnni() and not self.options.reduce_range:
            lines.append(OVERFLOW)
        if self.agreement < _AGREEMENT or self.logits_snr_db < _DECIBELS:
            lines.append(
                f'INT8 changes this model: {self.agreement:.1f} % of {len(self.judged)} images are classified as '
                f'before, logits {self.logits_snr_db:.1f} dB above the noise; expected {_AGREEMENT:.0f} % and '
                f'{_DECIBELS:.0f} dB. What may help: --calibration auto, --equalize, --weights per-channel, and to '
                f'--exclude the layers that --sensitivity names first.'
            )
        return lines


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
    classifier = onnx_classifier(model)
    images = open_evaluation(data, split, classifier.config, class_map, classifier.class_names)
    if options.calibration == 'auto' and options.images >= len(images):
        raise ValueError(
            f"'{images.folder}' has {len(images)} images. Calibrate on fewer (--images), so that 'auto' can compare "
            f'the calibrations on others.'
        )
    calibrations = CALIBRATIONS if options.calibration == 'auto' else [options.calibration]
    ways = [replace(options, calibration=calibration) for calibration in calibrations]
    return max(quantize_in(ways, model, images), key=lambda done: (done.agreement, done.logits_snr_db))


def quantize_in(ways: Sequence[QuantizationOptions], model: Any, images: Images) -> Iterator[Quantization]:
    """Quantizes a float `onnx.ModelProto` in ways of the same `images` and `seed`, each calibration done once."""
    # Fail before the calibration.
    excluded_nodes(model, ways[0].exclude)
    indices = images.sample(ways[0].images, ways[0].seed)
    chosen = set(indices)
    others = [index for index in images.sample(len(images), ways[0].seed + 1) if index not in chosen]
    others = others[: max(_MOST_OTHERS, 2 * len(indices))]
    judged = others[: len(indices)] or indices
    equalization = None
    if any(options.equalize for options in ways):
        equalization = equalize(model, images, [*indices, *others[: len(indices)]], others[len(indices) :])
    signal_to_noise = require('onnxruntime.quantization.qdq_loss_debug').compute_signal_to_quantization_noice_ratio
    ranges: dict[tuple[bool, str], bytes] = {}
    for options in ways:
        done = equalization if options.equalize else None
        form, key = done.model if done else model, (options.equalize, options.calibration)
        reader = _Reader(form, images, indices, options.calibration)
        quantized, ranges[key] = quantize(form, options, ranges.get(key, b''), reader)
        exact, rounded = logits_of((form, quantized), images, judged, 'agreement')
        agreement = 100 * (exact.argmax(1) == rounded.argmax(1)).float().mean().item()
        decibels = signal_to_noise(exact.numpy(), rounded.numpy())
        known = form, quantized, images, indices, options, ranges[key], done, judged
        yield Quantization(*known, agreement, decibels)


def quantize(
    model: Any, options: QuantizationOptions, ranges: bytes, reader: '_Reader | None' = None, only: Sequence[str] = ()
) -> tuple[Any, bytes]:
    """Returns a model in QDQ format, and the ranges of its tensors; a `reader` gives images to find these if there are
    none. `only` names nodes to quantize, in place of all that are not excluded.
    """
    quantization = require('onnxruntime.quantization')
    excluded = {} if only else excluded_nodes(model, options.exclude)
    tensorrt = options.target == 'tensorrt'
    others = [node.name for node in model.graph.node if tensorrt and node.op_type not in LAYERS]
    with TemporaryDirectory(prefix='repopt-timm-') as folder, quiet():
        # ONNX Runtime moves the weights of a model in memory to a file.
        source, result, cache = (Path(folder, name) for name in ('model.onnx', 'int8.onnx', 'ranges.json'))
        save_onnx(model, source)
        if ranges:
            cache.write_bytes(ranges)
        quantization.quantize_static(
            source,
            result,
            reader,
            per_channel=options.weights == 'per-channel',
            reduce_range=options.reduce_range,
            activation_type=quantization.QuantType['QInt8' if tensorrt else 'QUInt8'],
            nodes_to_quantize=list(only),
            nodes_to_exclude=[*excluded.values(), *others],
            calibrate_method=quantization.CalibrationMethod[CALIBRATIONS[options.calibration]],
            calibration_cache_path=cache,
            extra_options={'CalibStridedMinMax': 1, 'CalibPercentile': PERCENTILE} | (_TENSORRT if tensorrt else {}),
        )
        quantized = _finish(require('onnx').load(result), tensorrt)
        ranges = cache.read_bytes()
    # Drop ONNX Runtime's own notes, which are not JSON.
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(model.metadata_props)
    if not tensorrt:
        _refuse_single_layers(quantized, excluded)
    return quantized, ranges


class _Reader:
    """Gives ONNX Runtime one batch a call: its calibrators keep all activations until a call ends, and
    `CalibMaxIntermediateOutputs` of ONNX Runtime 1.32 drops the batches instead of merging them.
    """

    def __init__(self, model: Any, images: Images, indices: Sequence[int], title: str):
        _, (fixed, *_) = image_input(model)
        self._count = -(-len(indices) // (fixed or BATCH))
        self._feeds = feeds(model, images, indices, f'{title} calibration')
        self._turn: Iterator[Any] = iter(())

    def __len__(self) -> int:
        return self._count

    def set_range(self, start_index: int, end_index: int) -> None:
        self._turn = islice(self._feeds, end_index - start_index)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._turn, None)


def _finish(quantized: Any, tensorrt: bool) -> Any:
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
        elif tensorrt:
            # ONNX Runtime lets a residual that reads a layer's input read its rounded form too.
            for user, place in [use for use in after.uses() if use.node.op_type not in LAYERS]:
                user.replace_input_with(place, before)
    require('onnx_ir.passes.common').RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


def excluded_nodes(model: Any, patterns: Iterable[str]) -> dict[str, str]:
    """Maps excluded layers, and other nodes, to names of nodes."""
    layers = layers_of(model)
    excluded: dict[str, str] = {}
    for pattern in patterns:
        found = {name: layers[name].name for name in fnmatch.filter(layers, pattern)}
        found |= {node.name: node.name for node in model.graph.node if node.op_type == pattern}
        if not found:
            known = ', '.join(islice(layers, 8))
            raise ValueError(f"exclude '{pattern}': no layer or operator has this name, such as {known}.")
        excluded |= found
    return excluded


def _refuse_single_layers(quantized: Any, excluded: Mapping[str, str]) -> None:
    """Raises a ValueError if ONNX Runtime quantizes an excluded layer when it loads the file."""
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
            raise ValueError(
                f"'{layer}' alone cannot stay in float32: ONNX Runtime quantizes a layer between two quantized ones, "
                f'one scale for all channels, when it loads the file. Exclude the layer before or after it too.'
            )
