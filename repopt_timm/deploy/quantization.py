"""Static 8-bit quantization with ONNX Runtime: calibration on images, then a model in QDQ format."""

import fnmatch
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..datasets import Images, open_evaluation
from .channel_health import constant_inputs, dead_channels, health_warnings, kernel_outliers
from .classifier import data_config, image_input, onnx_classifier
from .equalization import Equalization, equalize
from .evaluation import check_classes
from .onnx_export import float_onnx
from .onnx_graph import LAYERS, layers_of, next_layer
from .runtime import explained, quiet, require, save_onnx

__all__ = [
    'CALIBRATIONS',
    'TARGETS',
    'WEIGHTS',
    'Quantization',
    'QuantizationOptions',
    'calibrate',
    'equalization_images',
    'excluded_nodes',
    'naming',
    'quantize',
    'quantize_calibrated',
    'quantize_nodes',
    'quantize_onnx',
    'requantized_layers',
]

WEIGHTS = ('per-channel', 'per-tensor')
CALIBRATIONS = ('minmax', 'entropy', 'percentile')
TARGETS = ('ort', 'tensorrt')

# Images whose activations are in memory at a time: 60 MB each in RepOpt-VGG-B1 at 224 px.
_CALIBRATION_BATCH = 8

# Of the model's size: ONNX Runtime writes two more copies, one after the other, and its own file.
_DISK_SPACE = 2.2

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
    of nodes of its own; biases stay in float32, and so do weights in the file, followed by a pair of nodes.

    Attributes:
        weights: One scale `per-channel` or `per-tensor`.
        calibration: How ranges of activations are found: `minmax`, `entropy` or `percentile`.
        percentile: Share of an activation's values that its range covers, in percent, for `percentile`.
        images: Number of images to calibrate on.
        seed: Seed of the draw.
        reduce_range: Use 7 bits for weights: without VNNI, x86 adds up pairs of products in 16 bits, which overflow.
        exclude: Layers to leave in float32: names, with `*`, or operators. From either end, or two in a row.
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
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights='{self.weights}': expected one of {', '.join(WEIGHTS)}.")
        if self.target not in TARGETS:
            raise ValueError(f"target='{self.target}': expected one of {', '.join(TARGETS)}.")
        if self.calibration not in CALIBRATIONS:
            raise ValueError(f"calibration='{self.calibration}': expected one of {', '.join(CALIBRATIONS)}.")
        if not 50 < self.percentile <= 100:
            raise ValueError(f'percentile={self.percentile}: expected more than 50 and at most 100.')
        if self.images < 1:
            raise ValueError(f'images={self.images}: calibration needs at least one.')


@dataclass(frozen=True)
class Quantization:
    """A model before and after quantizing, and what it was calibrated on.

    Attributes:
        model: The float `onnx.ModelProto`.
        quantized: The same in QDQ format.
        images: Where calibration images came from.
        indices: Which these were.
        options: How it was quantized.
        ranges: What `calibrate` found on them.
        dead: Layer to the number of its input channels that never changed on these images.
        equalization: What equalizing did to the float model, if it was asked for.
    """

    model: Any
    quantized: Any
    images: Images
    indices: Sequence[int]
    options: QuantizationOptions
    ranges: Any
    dead: Mapping[str, int]
    equalization: Equalization | None = None

    def warnings(self) -> list[str]:
        """Returns a line for dead channels and one for outliers in kernels, where the model has any."""
        dead = {} if self.equalization else self.dead
        return health_warnings(dead, kernel_outliers(self.model), len(self.indices))

    def agreement(self) -> float:
        """Returns the percentage of calibration images for which both models choose the same class."""
        first, second = onnx_classifier(self.model), onnx_classifier(self.quantized)
        same = 0
        for batch, _ in self.images.batches(self.indices, _CALIBRATION_BATCH, 'agreement'):
            same += int((first.run(batch).argmax(1) == second.run(batch).argmax(1)).sum())
        return 100 * same / len(self.indices)


def quantize_onnx(
    source: str | os.PathLike,
    data: str | os.PathLike,
    options: QuantizationOptions | None = None,
    split: str = 'train',
    overrides: Mapping[str, Any] | None = None,
    labelled: bool = False,
) -> Quantization:
    """Quantizes a trained model; `save_onnx` writes the result.

    Args:
        source: An `.onnx` file, or what `load_model` takes.
        data: Image folder to calibrate on, see `open_split`.
        options: See there.
        split: Split of `data` to draw from: images that the model will not be judged by.
        overrides: Preprocessing that differs from the model's own, by timm's names.
        labelled: Refuse images whose folders are not the classes of the model.

    Raises:
        FileNotFoundError: If there is no such model or folder.
        ValueError: If the folder has no images, one does not decode, or the model cannot be quantized.
        ImportError: If the `[deploy]` extra is not installed.
    """
    model = float_onnx(source, overrides)
    names = onnx_classifier(model).class_names
    images = open_evaluation(data, split, data_config(model, overrides), class_names=names)
    with naming(source):
        if labelled:
            check_classes(onnx_classifier(model), images)
        return quantize_calibrated(model, images, options or QuantizationOptions())


def quantize_calibrated(model: Any, images: Images, options: QuantizationOptions) -> Quantization:
    """Quantizes a float `onnx.ModelProto` as `quantize_onnx` does."""
    indices = images.sample(options.images, options.seed)
    # Before the work.
    excluded_nodes(model, options.exclude)
    dead, equalization = {}, None
    if options.equalize:
        equalization = equalize(model, images, *equalization_images(images, options))
        model = equalization.model
    else:
        dead = dead_channels(constant_inputs(model, images, indices))
    ranges = calibrate(model, images, indices, options)
    quantized = quantize(model, ranges, options)
    return Quantization(model, quantized, images, indices, options, ranges, dead, equalization)


@contextmanager
def naming(source: str | os.PathLike) -> Iterator[None]:
    """Names a model in errors about its `onnx.ModelProto`, which has no name by which its user knows it."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(('ONNX Runtime', 'The equalized model')):
            raise
        raise ValueError(f"'{os.fspath(source)}' cannot be quantized: {error}") from None


def equalization_images(images: Images, options: QuantizationOptions) -> tuple[list[int], list[int]]:
    """Draws the images for `equalize`: those of the calibration and as many others, and all further ones."""
    first = images.sample(options.images, options.seed)
    drawn = list(dict.fromkeys([*first, *images.sample(len(images), options.seed + 1)]))
    return drawn[: 2 * len(first)], drawn[2 * len(first) :]


def calibrate(model: Any, images: Images, indices: Sequence[int], options: QuantizationOptions) -> Any:
    """Finds the ranges of a model's activations.

    Args:
        model: A float `onnx.ModelProto`.
        images: Where images come from.
        indices: Those to calibrate on.
        options: See there; `weights` and `reduce_range` do not matter here.

    Returns:
        ONNX Runtime's `TensorsData`: the lowest and highest value of each tensor.

    Raises:
        ValueError: If an image does not decode, ONNX Runtime cannot run the model, the model is quantized already, or
            `exclude` matches none of its layers.
        OSError: If there is no room for temporary files.
    """
    quantization = require('onnxruntime.quantization')
    # Before the work.
    excluded_nodes(model, options.exclude)
    method = {'minmax': 'MinMax', 'entropy': 'Entropy', 'percentile': 'Percentile'}[options.calibration]
    with TemporaryDirectory(prefix='repopt-timm-') as folder, explained('ONNX Runtime cannot calibrate the model'):
        _check_space(folder, _DISK_SPACE * model.ByteSize())
        save_onnx(model, Path(folder, 'model.onnx'))
        with quiet():
            calibrator = quantization.create_calibrator(
                Path(folder, 'model.onnx'),
                _operators(),
                augmented_model_path=os.fspath(Path(folder, 'augmented.onnx')),
                calibrate_method=quantization.CalibrationMethod[method],
                extra_options={'percentile': options.percentile} if options.calibration == 'percentile' else {},
            )
        name, (fixed, *_) = image_input(model)
        title = f'{options.calibration} calibration'
        for batch, _ in images.batches(indices, fixed or _CALIBRATION_BATCH, title, whole=fixed > 0):
            # One batch per call: the calibrators keep what they get until a call ends.
            with quiet():
                calibrator.collect_data(_Reader({name: batch.numpy()}))
        with quiet():
            return calibrator.compute_data()


def _check_space(folder: str, needed: float) -> None:
    # ONNX does not notice an incomplete write, and fails when it reads the file.
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"'{Path(folder).parent}' has {free / 1e6:.0f} MB left, but calibration writes {needed / 1e6:.0f} MB. Make "
            f'room, or name another folder in the variable TMPDIR.'
        )


class _Reader:
    """Gives a calibrator one batch."""

    def __init__(self, batch: dict[str, np.ndarray]):
        self._batches = iter([batch])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def quantize(model: Any, ranges: Any, options: QuantizationOptions) -> Any:
    """Quantizes a model.

    Args:
        model: A float `onnx.ModelProto`, which stays as it is.
        ranges: What `calibrate` returned for it.
        options: See there.

    Returns:
        An `onnx.ModelProto` in QDQ format.

    Raises:
        ValueError: If the model is quantized already, `exclude` matches none of its layers, or names a single one
            between others.
    """
    excluded = excluded_nodes(model, options.exclude)
    quantized = quantize_nodes(model, ranges, options, exclude=excluded.values())
    refused = requantized_layers(quantized, excluded) if options.target == 'ort' else []
    if refused:
        other = next_layer(model, refused[0])
        raise ValueError(
            f"'{refused[0]}' alone cannot stay in float32: ONNX Runtime quantizes a layer between two quantized ones, "
            f'one scale for all channels, when it loads the file. '
            + (f"Exclude '{refused[0]}' and '{other}'." if other else 'Exclude a layer next to it too.')
        )
    return quantized


def quantize_nodes(
    model: Any, ranges: Any, options: QuantizationOptions, only: Iterable[str] = (), exclude: Iterable[str] = ()
) -> Any:
    """Quantizes nodes by name, whether or not ONNX Runtime will leave the others in float32.

    Args:
        model: A float `onnx.ModelProto`, which stays as it is.
        ranges: What `calibrate` returned for it.
        options: See there; `exclude` does not matter here.
        only: Names of nodes. Defaults to all.
        exclude: Names of nodes to leave out.
    """
    quantization = require('onnxruntime.quantization')
    copy = type(model)()
    copy.CopyFrom(model)
    signed, unsigned = quantization.QuantType.QInt8, quantization.QuantType.QUInt8
    tensorrt = options.target == 'tensorrt'
    with quiet(), explained('ONNX Runtime cannot quantize the model'):
        quantizer = quantization.QDQQuantizer(
            copy,
            options.weights == 'per-channel',
            options.reduce_range,
            signed,
            signed if tensorrt else unsigned,
            ranges,
            list(only),
            list(exclude),
            LAYERS if tensorrt else _operators(),
            _TENSORRT if tensorrt else {},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    if tensorrt:
        _leave_to_layers(quantizer.model.model)
    return quantizer.model.model


def _leave_to_layers(model: Any) -> None:
    # ONNX Runtime lets everything else that reads a layer's input, such as a residual, read its rounded form too.
    rounded = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == 'DequantizeLinear'}
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == 'QuantizeLinear'}
    for node in model.graph.node:
        if node.op_type not in LAYERS:
            for place, name in enumerate(node.input):
                if name in rounded:
                    node.input[place] = sources[rounded[name]]


def excluded_nodes(model: Any, patterns: Iterable[str]) -> dict[str, str]:
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
            raise ValueError(f"exclude '{pattern}': no layer or operator has this name, expected {_shown(layers)}.")
        excluded |= found
    return excluded


def _shown(layers: Iterable[str], most: int = 8) -> str:
    names = list(layers)
    return f'one of {", ".join(names[:most])}{", ..." if names[most:] else ""}'


def requantized_layers(quantized: Any, excluded: Mapping[str, str]) -> list[str]:
    """Returns the layers that ONNX Runtime quantizes when it loads the file: those between two quantized tensors.

    Args:
        quantized: What `quantize_nodes` returned.
        excluded: Layers that it left in float32, to the names of their nodes.
    """
    producers = {output: node for node in quantized.graph.node for output in node.output}
    consumers: dict[str, list[Any]] = {}
    for node in quantized.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    nodes = {node.name: node for node in quantized.graph.node}
    found = []
    for layer, name in excluded.items():
        node = nodes.get(name)
        if node is None or node.op_type not in ('Conv', 'ConvTranspose', 'Gemm'):
            continue
        following = consumers.get(node.output[0], [])
        # ONNX Runtime fuses these into the rounding.
        while len(following) == 1 and following[0].op_type in ('Relu', 'Clip'):
            following = consumers.get(following[0].output[0], [])
        before = producers.get(node.input[0])
        between = before is not None and before.op_type == 'DequantizeLinear'
        if between and any(node.op_type == 'QuantizeLinear' for node in following):
            found.append(layer)
    return found


def _operators() -> list[str]:
    registry = require('onnxruntime.quantization.registry')
    return sorted({*registry.QLinearOpsRegistry, *registry.QDQRegistry})
