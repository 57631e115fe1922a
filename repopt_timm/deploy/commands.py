"""The deployment commands of `repopt-timm`: export, quantize, evaluate and compare-int8."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..console import tell
from ..files import write_text
from .comparison import compare_int8, comparison_table
from .evaluation import evaluate
from .export import export_onnx
from .quantization import CALIBRATIONS, WEIGHTS, QuantizationOptions, quantize_onnx
from .report import layer_report, plot_layers
from .runtime import require, save_onnx

__all__ = ['add_class_map', 'add_commands']

# Makes a command of a name, a function of the arguments and a help text.
Command = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]

_MODEL = 'checkpoint, folder in the format of timm, or name for timm.create_model'
_DATA = 'folder of images, <class>/..., or one with a folder for each split'


def add_commands(command: Command) -> None:
    """Adds the commands to a parser, each made by `command`."""
    export = command('export', _export, 'write a trained model as ONNX')
    export.add_argument('model', help=_MODEL)
    export.add_argument('--onnx', metavar='FILE', required=True, help='file to write')
    _add_preprocessing(export)

    quantized = command('quantize', _quantize, 'write a trained model as INT8 ONNX')
    quantized.add_argument('model', help=f'{_MODEL}, or .onnx file')
    quantized.add_argument('--data', metavar='DIR', required=True, help=f'{_DATA}, to calibrate on')
    quantized.add_argument('--split', default='train', help='split to calibrate on')
    quantized.add_argument('--out', metavar='FILE', required=True, help='file to write')
    quantized.add_argument('--weights', choices=WEIGHTS, default=WEIGHTS[0], help='one scale each')
    quantized.add_argument('--calibration', choices=CALIBRATIONS, default=CALIBRATIONS[0])
    _add_quantization(quantized)
    quantized.add_argument('--report', metavar='DIR', help='write layers.png and layers.json, on each layer')
    quantized.add_argument('--versus', metavar='MODEL', help='with --report, another model to draw beside')
    _add_preprocessing(quantized)

    evaluated = command('evaluate', _evaluate, 'measure accuracy, latency, throughput and size of a model')
    evaluated.add_argument('model', help=f'{_MODEL}, or .onnx file')
    evaluated.add_argument('--data', metavar='DIR', required=True, help=_DATA)
    evaluated.add_argument('--split', default='validation', help='split to evaluate')
    add_class_map(evaluated)
    evaluated.add_argument('-b', '--batch-size', type=_positive, default=32, metavar='N')
    _add_threads(evaluated)
    _add_preprocessing(evaluated)

    compared = command('compare-int8', _compare, 'measure models in float32 and in all kinds of INT8, in one table')
    compared.add_argument('models', nargs='+', metavar='[LABEL=]MODEL', help=f'{_MODEL}, or .onnx file')
    compared.add_argument('--data', metavar='DIR', required=True, help=f'{_DATA}; validation is evaluated')
    add_class_map(compared)
    compared.add_argument('--calibration-data', metavar='DIR', help='calibrate on the train split of this [--data]')
    compared.add_argument('--out', metavar='DIR', help='write int8.md and int8.json')
    compared.add_argument('--weights', nargs='+', choices=WEIGHTS, default=WEIGHTS)
    compared.add_argument('--calibrations', nargs='+', choices=CALIBRATIONS, default=CALIBRATIONS)
    _add_quantization(compared)
    compared.add_argument(
        '--latency-batches', nargs='*', type=_positive, default=(1, 32), metavar='N', help='batch sizes to time [1 32]'
    )
    _add_threads(compared)
    _add_preprocessing(compared)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{value} is less than 1')
    return value


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    defaults = QuantizationOptions()
    parser.add_argument(
        '--percentile', type=float, default=defaults.percentile, help='values that a range covers, in percent'
    )
    parser.add_argument('--images', type=_positive, default=defaults.images, metavar='N', help='images to calibrate on')
    parser.add_argument('--seed', type=int, default=defaults.seed, help='draws these images')
    parser.add_argument('--reduce-range', action='store_true', help='7-bit weights, for x86 without VNNI')
    parser.add_argument(
        '--exclude',
        nargs='+',
        default=(),
        metavar='LAYER',
        help="leave in float32, such as head.fc, 'stages.3.*', Add",
    )


def add_class_map(parser: argparse.ArgumentParser) -> None:
    """Adds `--class-map` to a command that evaluates."""
    parser.add_argument('--class-map', default='', metavar='FILE', help='the one that the model was trained with')


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--threads', type=_positive, metavar='N', help='threads of the model; all cores when left out')


def _add_preprocessing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("preprocessing, where it differs from the model's own")
    group.add_argument('--input-size', nargs=3, type=_positive, metavar=('C', 'H', 'W'))
    group.add_argument('--mean', nargs='+', type=float)
    group.add_argument('--std', nargs='+', type=float)
    group.add_argument('--interpolation')
    group.add_argument('--crop-pct', type=float)
    group.add_argument('--crop-mode')


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    names = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _options(args: argparse.Namespace, **more: Any) -> QuantizationOptions:
    return QuantizationOptions(
        percentile=args.percentile,
        images=args.images,
        seed=args.seed,
        reduce_range=args.reduce_range,
        exclude=tuple(args.exclude),
        **more,
    )


def _megabytes(size: int) -> str:
    return f'{size / 1e6:.1f} MB'


def _short(source: str) -> str:
    return '/'.join(Path(source).parts[-2:])


def _export(args: argparse.Namespace) -> None:
    told = export_onnx(args.model, args.onnx, _overrides(args))
    left = f', {told["batchnorms"]} BatchNorms without a convolution before them' if told['batchnorms'] else ''
    text = (
        f'{args.model} -> {args.onnx}: {_megabytes(told["bytes"])}, opset {told["opset"]}{left}; logits within '
        f'{told["difference"]:.1e} of PyTorch'
    )
    tell(args, told, text)


def _quantize(args: argparse.Namespace) -> None:
    if args.versus and not args.report:
        raise ValueError('--versus draws another model into the report: name a folder for it with --report.')
    if args.versus == args.model:
        raise ValueError(f"--versus '{args.versus}' is the model itself: name another one to draw beside it.")
    if args.report:
        require('matplotlib')
    options = _options(args, weights=args.weights, calibration=args.calibration)
    done = quantize_onnx(args.model, args.data, options, args.split, _overrides(args))
    told: dict[str, Any] = {
        'out': args.out,
        'bytes': done.quantized.ByteSize(),
        'float_bytes': done.model.ByteSize(),
        'images': len(done.indices),
        'folder': str(done.images.folder),
        'agreement': done.agreement(),
    }
    text = (
        f'{args.model} -> {args.out}: {_megabytes(told["float_bytes"])} -> {_megabytes(told["bytes"])}; calibrated on '
        f'{told["images"]} images of {told["folder"]}, of which {told["agreement"]:.1f} % are classified as before'
    )
    reports = {}
    if args.report:
        name = _short if _short(args.model) != _short(args.versus or '') else str
        reports[name(args.model)] = layer_report(done)
        if args.versus:
            other = quantize_onnx(args.versus, args.data, options, args.split, _overrides(args))
            reports[name(args.versus)] = layer_report(other)
    save_onnx(done.quantized, args.out)
    if args.report:
        told['report'] = args.report
        plot_layers(reports, Path(args.report, 'layers.png'))
        write_text(Path(args.report, 'layers.json'), json.dumps(reports, indent=2) + '\n')
        text += f'; report in {args.report}'
    tell(args, told, text)


def _evaluate(args: argparse.Namespace) -> None:
    told = evaluate(args.model, args.data, args.split, args.batch_size, args.threads, _overrides(args), args.class_map)
    lines = [
        f'top-1       {told["top1"]:.2f} %',
        f'top-5       {told["top5"]:.2f} %  of {told["images"]} images',
        f'latency     {told["latency_ms"]:.2f} ms median, {told["latency_p90_ms"]:.2f} ms p90 at batch 1',
        f'throughput  {told["throughput"]:.0f} images/s at batch {told["batch_size"]}',
        f'size        {_megabytes(told["bytes"])}, {told["backend"]}',
    ]
    tell(args, told, '\n'.join(lines))


def _compare(args: argparse.Namespace) -> None:
    models = dict(_labelled(text) for text in args.models)
    if len(models) < len(args.models):
        raise ValueError('Two models have the same label: name them as LABEL=MODEL.')
    results = compare_int8(
        models,
        args.data,
        args.calibration_data,
        args.weights,
        args.calibrations,
        _options(args),
        args.latency_batches,
        args.threads,
        _overrides(args),
        args.class_map,
    )
    table = comparison_table(results)
    if args.out:
        write_text(Path(args.out, 'int8.md'), table + '\n')
        write_text(Path(args.out, 'int8.json'), json.dumps(results, indent=2) + '\n')
    tell(args, results, table)


def _labelled(text: str) -> tuple[str, str]:
    label, separator, source = text.partition('=')
    if not separator or Path(text).exists():
        return _short(text), text
    return label, source
