"""The deployment commands of `repopt-timm` and their arguments: export, quantize, evaluate and compare-int8."""

import argparse
import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files import check_output, write_text
from ..reporting import add_command, positive, print_result
from ..train.arguments import INTERPOLATIONS
from .channel_health import health_warnings, kernel_outliers
from .equalization import describe
from .evaluation import UNSTEADY, evaluate
from .int8_table import compare_int8, comparison_table
from .layer_noise import layer_report, plot_layers
from .onnx_export import OPSET, ExportOptions, export_onnx
from .quantization import CALIBRATIONS, TARGETS, WEIGHTS, Quantization, QuantizationOptions, quantize_onnx
from .runtime import require, save_onnx
from .sensitivity import keep_in_float, layer_sensitivity, plot_sensitivity, sensitivity_table

__all__ = ['add_class_map', 'add_commands', 'add_form', 'add_quantization', 'form_options']

_logger = logging.getLogger(__name__)

_MODEL = 'checkpoint, folder in the format of timm, or name for timm.create_model'
_EQUALIZE = 'remove dead channels and equalize layers, which changes no logit'
_REPORT_FILES = ('layers.png', 'layers.json')
_SENSITIVITY_FILES = ('sensitivity.md', 'sensitivity.json', 'sensitivity.png')
_DATA = 'folder of images, <class>/..., or one with a folder for each split'


def add_commands(commands: Any) -> None:
    """Adds export, quantize, evaluate and compare-int8 to the commands of `repopt-timm`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    export = add_command(commands, 'export', _export)
    export.add_argument('model', help=_MODEL)
    export.add_argument('--onnx', metavar='FILE', required=True, help='file to write')
    export.add_argument(
        '--opset', type=positive(int), default=OPSET, metavar='N', help=f"version of ONNX's operators, {OPSET} or later"
    )
    export.add_argument(
        '--fixed-batch', type=positive(int), metavar='N', help='take N images at a time, no other number'
    )
    export.add_argument('--fp16', action='store_true', help='weights and computation in float16')
    _add_preprocessing(export)

    quantized = add_command(commands, 'quantize', _quantize)
    quantized.add_argument('model', help=f'{_MODEL}, or .onnx file')
    quantized.add_argument('--data', metavar='DIR', required=True, help=f'{_DATA}, to calibrate on')
    quantized.add_argument('--split', default='train', help='split to calibrate on')
    quantized.add_argument('--out', metavar='FILE', required=True, help='file to write')
    add_form(quantized)
    add_quantization(quantized)
    quantized.add_argument('--report', metavar='DIR', help='write layers.png and layers.json, on each layer')
    quantized.add_argument('--versus', metavar='MODEL', help='with --report, another model to draw beside')
    sensitivity_help = 'write sensitivity.md, .png and .json: accuracy with one layer at a time in INT8'
    quantized.add_argument('--sensitivity', metavar='DIR', help=sensitivity_help)
    drop_help = (
        'keep the fewest layers in float32, in the order of the ranking, with which at most POINTS of top-1 are lost '
        'on the calibration images'
    )
    quantized.add_argument('--max-drop', type=float, metavar='POINTS', help=drop_help)
    _add_preprocessing(quantized)

    evaluated = add_command(commands, 'evaluate', _evaluate)
    evaluated.add_argument('model', help=f'{_MODEL}, or .onnx file')
    evaluated.add_argument('--data', metavar='DIR', required=True, help=_DATA)
    evaluated.add_argument('--split', default='validation', help='split to evaluate')
    add_class_map(evaluated)
    evaluated.add_argument('-b', '--batch-size', type=positive(int), default=32, metavar='N', help='images at a time')
    _add_threads(evaluated)
    _add_preprocessing(evaluated)

    compared = add_command(commands, 'compare-int8', _compare)
    compared.add_argument('models', nargs='+', metavar='[LABEL=]MODEL', help=f'{_MODEL}, or .onnx file')
    compared.add_argument('--data', metavar='DIR', required=True, help=f'{_DATA}; validation is evaluated')
    add_class_map(compared)
    compared.add_argument('--calibration-data', metavar='DIR', help='calibrate on the train split of this [--data]')
    compared.add_argument('--out', metavar='DIR', help='write int8.md and int8.json')
    weights_help = 'scales of weights to measure: one per output channel, one per tensor'
    compared.add_argument('--weights', nargs='+', choices=WEIGHTS, default=WEIGHTS, help=weights_help)
    calibrations_help = 'ways to find the ranges of activations, each measured'
    compared.add_argument(
        '--calibrations', nargs='+', choices=CALIBRATIONS, default=CALIBRATIONS, help=calibrations_help
    )
    compared.add_argument('--targets', nargs='+', choices=TARGETS, default=TARGETS[:1], help='forms to measure')
    add_quantization(compared)
    compared.add_argument('--equalize', action='store_true', help=f'measure each model a second time: {_EQUALIZE}')
    compared.add_argument(
        '--latency-batches',
        nargs='*',
        type=positive(int),
        default=(1, 32),
        metavar='N',
        help='batch sizes to time',
    )
    _add_threads(compared)
    _add_preprocessing(compared)


def add_class_map(parser: argparse.ArgumentParser) -> None:
    """Adds `--class-map` to a command that evaluates."""
    parser.add_argument('--class-map', default='', metavar='FILE', help='class map used in training')


def add_form(parser: argparse.ArgumentParser) -> None:
    """Adds what a command takes that quantizes one way."""
    add = parser.add_argument
    add('--weights', choices=WEIGHTS, default=WEIGHTS[0], help='one scale per output channel, or one per tensor')
    add('--calibration', choices=CALIBRATIONS, default=CALIBRATIONS[0], help='way to find the ranges of activations')
    add('--equalize', action='store_true', help=f'first {_EQUALIZE}')
    add('--target', choices=TARGETS, default=TARGETS[0], help='runtime; ort is for OpenVINO too')


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """Adds what all commands that quantize take."""
    defaults = QuantizationOptions()
    add = parser.add_argument
    add('--percentile', type=float, default=defaults.percentile, help='values that a range covers, in percent')
    add('--images', type=positive(int), default=defaults.images, metavar='N', help='images to calibrate on')
    add('--seed', type=int, default=defaults.seed, help='seed for choosing calibration images')
    add('--reduce-range', action='store_true', help='7-bit weights, for x86 without VNNI')
    exclude_help = "leave in float32, such as head.fc, 'stages.3.*', Add"
    add('--exclude', nargs='+', default=(), metavar='LAYER', help=exclude_help)


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--threads', type=positive(int), metavar='N', help='threads of the model [all cores]')


def _add_preprocessing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("preprocessing, where it differs from the model's own")
    add = group.add_argument
    size_help = 'channels, height and width of the images'
    add('--input-size', nargs=3, type=positive(int), metavar=('C', 'H', 'W'), help=size_help)
    add('--mean', nargs='+', type=float, help='mean pixel value, or one for each channel')
    add('--std', nargs='+', type=float, help='standard deviation of pixel values, or one for each channel')
    add('--interpolation', choices=INTERPOLATIONS, help='resize interpolation')
    add('--crop-pct', type=positive(float), help='share of the resized image that the crop keeps')
    add('--crop-mode', choices=('center', 'squash', 'border'), help='way to crop')


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    names = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _options(args: argparse.Namespace, **more: Any) -> QuantizationOptions:
    names = ('percentile', 'images', 'seed', 'reduce_range')
    return QuantizationOptions(exclude=tuple(args.exclude), **{name: getattr(args, name) for name in names}, **more)


def form_options(args: argparse.Namespace) -> QuantizationOptions:
    """Returns how a command with the arguments of `add_form` and `add_quantization` shall quantize."""
    form = {name: getattr(args, name) for name in ('weights', 'calibration', 'equalize', 'target')}
    return _options(args, **form)


def _megabytes(size: int) -> str:
    return f'{size / 1e6:.1f} MB'


def _short(source: str) -> str:
    return '/'.join(Path(source).parts[-2:])


def _export(args: argparse.Namespace) -> None:
    path = check_output(args.onnx, args.model)
    options = ExportOptions(args.opset, args.fixed_batch or 0, args.fp16)
    result = {**export_onnx(args.model, path, _overrides(args), options), 'out': args.onnx}
    _warn(health_warnings({}, result['outliers'], still=result['still_channels']))
    left = f', {result["batchnorms"]} BatchNorms without a convolution before them' if result['batchnorms'] else ''
    text = (
        f'{args.model} -> {args.onnx}: {_megabytes(result["bytes"])}, opset {result["opset"]}{left}; logits within '
        f'{result["difference"]:.1e} of PyTorch, relative to the largest'
    )
    print_result(args, result, text)


def _quantize(args: argparse.Namespace) -> None:
    files = _quantize_files(args)
    options = form_options(args)
    labelled = args.max_drop is not None
    done = quantize_onnx(args.model, args.data, options, args.split, _overrides(args), labelled)
    unhealthy = done.warnings()
    _warn(unhealthy)
    if labelled:
        _warn(_unresolved(args.max_drop, len(done.indices)))
    ranking = layer_sensitivity(done) if args.sensitivity or labelled else {}
    if args.sensitivity:
        # Before what may be refused: the ranking shows what else to try.
        plot_sensitivity(ranking, files['sensitivity.png'])
        write_text(files['sensitivity.json'], json.dumps(ranking, indent=2) + '\n')
        write_text(files['sensitivity.md'], sensitivity_table(ranking) + '\n')
    kept: dict[str, Any] = {}
    if labelled:
        done, kept = keep_in_float(done, ranking, args.max_drop)
        _warn([] if kept['ms'] else [UNSTEADY])
    result = _quantize_result(args, done, kept)
    reports = _layer_reports(args, done) if args.report else {}
    save_onnx(done.quantized, files['out'])
    if args.report:
        plot_layers(reports, files['layers.png'])
        write_text(files['layers.json'], json.dumps(reports, indent=2) + '\n')
    advise_equalize = bool(kept.get('kept') and unhealthy and not options.equalize)
    print_result(args, result, _quantize_text(args, result, ranking, advise_equalize))


def _quantize_files(args: argparse.Namespace) -> dict[str, Path]:
    """Checks what can be known before the work, and returns the files to write."""
    if args.versus and not args.report:
        raise ValueError('--versus draws another model into the report: name a folder for it with --report.')
    if args.versus == args.model:
        raise ValueError(f"--versus '{args.versus}' is the model itself: name another one to draw beside it.")
    if args.max_drop is not None and not args.max_drop >= 0:
        raise ValueError(f'--max-drop is {args.max_drop}, expected points of accuracy, 0 or more.')
    if args.report or args.sensitivity:
        require('matplotlib')
    named = {'out': args.out}
    for folder, names in ((args.report, _REPORT_FILES), (args.sensitivity, _SENSITIVITY_FILES)):
        named |= {name: Path(folder, name) for name in names if folder}
    sources = [args.model, *([args.versus] if args.versus else [])]
    return {name: check_output(file, *sources) for name, file in named.items()}


def _layer_reports(args: argparse.Namespace, done: Quantization) -> dict[str, Any]:
    reports = {args.model: layer_report(done)}
    if args.versus:
        other = quantize_onnx(args.versus, args.data, form_options(args), args.split, _overrides(args))
        reports[args.versus] = layer_report(other)
    name = _short if len(set(map(_short, reports))) == len(reports) else str
    return {name(source): report for source, report in reports.items()}


def _quantize_result(args: argparse.Namespace, done: Quantization, kept: Mapping[str, Any]) -> dict[str, Any]:
    result = {
        'out': args.out,
        'bytes': done.quantized.ByteSize(),
        'float_bytes': done.model.ByteSize(),
        'images': len(done.indices),
        'folder': str(done.images.folder),
        'agreement': done.agreement(),
        'dead_channels': dict(done.dead),
        'outliers': kernel_outliers(done.model),
        **kept,
    }
    if done.equalization:
        result['equalization'] = done.equalization.counts
    named = {'report': args.report, 'sensitivity': args.sensitivity}
    return {**result, **{name: folder for name, folder in named.items() if folder}}


def _quantize_text(
    args: argparse.Namespace, result: Mapping[str, Any], ranking: Mapping[str, Any], advise_equalize: bool
) -> str:
    text = (
        f'{args.model} -> {args.out}: {_megabytes(result["float_bytes"])} -> {_megabytes(result["bytes"])}; calibrated '
        f'on {result["images"]} images of {result["folder"]}, of which {result["agreement"]:.1f} % are classified as '
        f'before'
    )
    if 'equalization' in result:
        text += f'; {describe(result["equalization"])}'
    if 'kept' in result:
        text += '; ' + _kept_text(result)
    if advise_equalize:
        text += '; try --equalize, which costs no time'
    if args.report:
        text += f'; report in {args.report}'
    if args.sensitivity:
        text += f'; sensitivity in {args.sensitivity}, most sensitive:\n{sensitivity_table(ranking, 5)}'
    return text


def _kept_text(kept: Mapping[str, Any]) -> str:
    layers = ', '.join(kept['kept']) or 'no layer'
    cost = f', {kept["int8_ms"]:.3g} -> {kept["ms"]:.3g} ms for an image' if kept['ms'] else ''
    return f'{layers} in float32, {kept["drop"]:.2f} points lost on the calibration images{cost}'


def _unresolved(max_drop: float, images: int) -> list[str]:
    if not 0 < max_drop < 300 / images:
        return []
    needed = math.ceil(300 / max_drop)
    return [
        f'One of {images} images is {100 / images:.2g} points of accuracy, coarse for --max-drop {max_drop:g}. '
        f'Take --images {needed} or more.'
    ]


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        _logger.warning(line)


def _evaluate(args: argparse.Namespace) -> None:
    result = evaluate(
        args.model, args.data, args.split, args.batch_size, args.threads, _overrides(args), args.class_map
    )
    lines = [
        f'top-1       {result["top1"]:.2f} %',
        f'top-5       {result["top5"]:.2f} %  of {result["images"]} images',
        f'latency     {result["latency_ms"]:.2f} ms median, {result["latency_p90_ms"]:.2f} ms p90 at batch '
        f'{result["latency_batch"]}',
        f'throughput  {result["throughput"]:.0f} images/s at batch {result["batch_size"]}',
        f'size        {_megabytes(result["bytes"])}, {result["backend"]}',
    ]
    _warn([] if result['steady'] else [UNSTEADY])
    print_result(args, result, '\n'.join(lines))


def _compare(args: argparse.Namespace) -> None:
    models = dict(_labelled(text) for text in args.models)
    if len(models) < len(args.models):
        raise ValueError('Two models have the same label: name them as LABEL=MODEL.')
    files = [check_output(Path(args.out, f'int8.{suffix}'), *models.values()) for suffix in ('md', 'json') if args.out]
    results = compare_int8(
        models,
        args.data,
        args.calibration_data,
        args.weights,
        args.calibrations,
        _options(args, equalize=args.equalize),
        args.latency_batches,
        args.threads,
        _overrides(args),
        args.class_map,
        args.targets,
    )
    table = comparison_table(results)
    for file, text in zip(files, (table, json.dumps(results, indent=2))):
        write_text(file, text + '\n')
    print_result(args, results, table)


def _labelled(text: str) -> tuple[str, str]:
    label, separator, source = text.partition('=')
    if not separator or Path(text).exists():
        return _short(text), text
    return label, source
