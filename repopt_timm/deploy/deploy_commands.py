"""The deployment commands of `repopt-timm` and their arguments: export, quantize and compare-int8."""

import argparse
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files import check_output, write_text
from ..reporting import add_command, positive, print_result
from .channel_health import health_warnings, kernel_outliers
from .equalization import describe
from .evaluate_commands import DATA_HELP, MODEL_HELP, add_class_map, add_preprocessing, add_threads, overrides_of
from .int8_table import compare_int8, comparison_table
from .layer_noise import layer_report, plot_layers
from .onnx_export import OPSET, ExportOptions, export_onnx
from .quantization import CALIBRATIONS, TARGETS, WEIGHTS, QuantizationOptions, quantize_onnx
from .runtime import require, save_onnx
from .sensitivity import layer_sensitivity, plot_sensitivity, sensitivity_table

__all__ = ['add_commands']

_logger = logging.getLogger(__name__)

_EQUALIZE = 'remove dead channels and equalize layers, which changes no logit'


def add_commands(commands: Any) -> None:
    """Adds export, quantize and compare-int8 to the commands of `repopt-timm`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    export = add_command(commands, 'export', _export)
    add = export.add_argument
    add('model', help=MODEL_HELP)
    add('--onnx', metavar='FILE', type=_onnx_file, required=True, help='file to write')
    opset_help = f"version of ONNX's operators, {OPSET} or later"
    add('--opset', type=positive(int), default=OPSET, metavar='N', help=opset_help)
    add('--fixed-batch', type=positive(int), metavar='N', help='take N images at a time, no other number')
    add('--fp16', action='store_true', help='weights and computation in float16')
    add_preprocessing(export)

    quantized = add_command(commands, 'quantize', _quantize)
    add = quantized.add_argument
    add('model', help=f'{MODEL_HELP}, or .onnx file')
    add('--data', metavar='DIR', required=True, help=f'{DATA_HELP}, to calibrate on')
    add('--split', default='train', help='split to calibrate on')
    add_class_map(quantized)
    add('--out', metavar='FILE', type=_onnx_file, required=True, help='file to write')
    defaults = QuantizationOptions()
    add('--weights', choices=WEIGHTS, default=defaults.weights, help='one scale per output channel, or one per tensor')
    calibration_help = (
        'auto tries all, and takes the one whose file classifies most other images as before; ways to find the ranges '
        'of activations'
    )
    add('--calibration', choices=(*CALIBRATIONS, 'auto'), default=defaults.calibration, help=calibration_help)
    add('--equalize', action='store_true', help=f'first {_EQUALIZE}')
    add('--target', choices=TARGETS, default=defaults.target, help='runtime; ort is for OpenVINO too')
    _add_quantization(quantized)
    add('--report', metavar='DIR', type=_folder, help='write layers.png and layers.json, on each layer')
    add('--versus', metavar='MODEL', help='with --report, another model to draw beside')
    sensitivity_help = 'write sensitivity.md, .png and .json: accuracy with one layer at a time in INT8'
    add('--sensitivity', metavar='DIR', type=_folder, help=sensitivity_help)
    add_preprocessing(quantized)

    compared = add_command(commands, 'compare-int8', _compare)
    add = compared.add_argument
    add('models', nargs='+', metavar='[LABEL=]MODEL', help=f'{MODEL_HELP}, or .onnx file')
    add('--data', metavar='DIR', required=True, help=f'{DATA_HELP}; validation is evaluated')
    add_class_map(compared)
    add('--calibration-data', metavar='DIR', help='calibrate on the train split of this [--data]')
    add('--out', metavar='DIR', type=_folder, help='write int8.md and int8.json')
    weights_help = 'scales of weights to measure: one per output channel, one per tensor'
    add('--weights', nargs='+', choices=WEIGHTS, default=WEIGHTS, help=weights_help)
    calibrations_help = 'ways to find the ranges of activations, each measured'
    add('--calibrations', nargs='+', choices=CALIBRATIONS, default=CALIBRATIONS, help=calibrations_help)
    add('--targets', nargs='+', choices=TARGETS, default=TARGETS[:1], help='forms to measure')
    _add_quantization(compared)
    add('--equalize', action='store_true', help=f'measure each model a second time: {_EQUALIZE}')
    batches_help = 'batch sizes to time'
    add('--latency-batches', nargs='*', type=positive(int), default=(1, 32), metavar='N', help=batches_help)
    add_threads(compared)
    add_preprocessing(compared)


def _onnx_file(text: str) -> str:
    if Path(text).suffix != '.onnx':
        raise argparse.ArgumentTypeError(f"'{text}' does not end in .onnx, by which other commands know such files")
    return text


def _folder(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError('the name of the folder is empty')
    return text


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    defaults = QuantizationOptions()
    add = parser.add_argument
    add('--percentile', type=float, default=defaults.percentile, help='values that a range covers, in percent')
    add('--images', type=positive(int), default=defaults.images, metavar='N', help='images to calibrate on')
    add('--seed', type=int, default=defaults.seed, help='seed for choosing calibration images')
    add('--reduce-range', action='store_true', help='7-bit weights, for x86 without VNNI')
    exclude_help = "leave in float32, such as head.fc, 'stages.3.*', Add"
    add('--exclude', nargs='+', default=(), metavar='LAYER', help=exclude_help)


def _options(args: argparse.Namespace, *more: str) -> QuantizationOptions:
    names = ('percentile', 'images', 'seed', 'reduce_range', 'equalize', *more)
    return QuantizationOptions(exclude=tuple(args.exclude), **{name: getattr(args, name) for name in names})


def _megabytes(size: int) -> str:
    return f'{size / 1e6:.1f} MB'


def _short(source: str) -> str:
    return '/'.join(Path(source).parts[-2:])


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        _logger.warning(line)


def _export(args: argparse.Namespace) -> None:
    path = check_output(args.onnx, args.model)
    options = ExportOptions(args.opset, args.fixed_batch or 0, args.fp16)
    result = {**export_onnx(args.model, path, overrides_of(args), options), 'out': args.onnx}
    _warn(health_warnings({}, result['outliers'], still=result['still_channels']))
    left = f', {result["batchnorms"]} BatchNorms without a convolution before them' if result['batchnorms'] else ''
    text = (
        f'{args.model} -> {args.onnx}: {_megabytes(result["bytes"])}, opset {result["opset"]}{left}; logits within '
        f'{result["difference"]:.1e} of PyTorch, relative to the largest'
    )
    print_result(args, result, text)


def _quantize(args: argparse.Namespace) -> None:
    if args.versus and not args.report:
        raise ValueError('--versus draws another model into the report: name a folder for it with --report.')
    if args.versus == args.model:
        raise ValueError(f"--versus '{args.versus}' is the model itself: name another one to draw beside it.")
    if args.report or args.sensitivity:
        require('matplotlib')
    files = {'out': args.out}
    for folder, name, suffixes in (
        (args.report, 'layers', 'png json'),
        (args.sensitivity, 'sensitivity', 'md png json'),
    ):
        files |= {f'{name}.{suffix}': Path(folder, f'{name}.{suffix}') for suffix in suffixes.split() if folder}
    files = {name: check_output(file, *filter(None, (args.model, args.versus))) for name, file in files.items()}
    options = _options(args, 'weights', 'calibration', 'target')
    how = args.data, options, args.split, overrides_of(args), args.class_map
    done = quantize_onnx(args.model, *how)
    _warn(done.warnings())
    if args.sensitivity:
        ranking = layer_sensitivity(done)
        plot_sensitivity(ranking, files['sensitivity.png'])
        write_text(files['sensitivity.json'], json.dumps(ranking, indent=2) + '\n')
        write_text(files['sensitivity.md'], sensitivity_table(ranking) + '\n')
    if args.report:
        reports = {args.model: layer_report(done)}
        if args.versus:
            reports[args.versus] = layer_report(quantize_onnx(args.versus, *how))
        if len({_short(source) for source in reports}) == len(reports):
            reports = {_short(source): report for source, report in reports.items()}
        plot_layers(reports, files['layers.png'])
        write_text(files['layers.json'], json.dumps(reports, indent=2) + '\n')
    save_onnx(done.quantized, files['out'])
    result = {
        'out': args.out,
        'bytes': done.quantized.ByteSize(),
        'float_bytes': done.model.ByteSize(),
        'images': len(done.indices),
        'folder': str(done.images.folder),
        'calibration': done.options.calibration,
        'agreement': done.agreement,
        'logits_snr_db': done.logits_snr_db,
        'dead_channels': dict(done.dead),
        'outliers': kernel_outliers(done.model),
        **({'equalization': done.equalization.counts} if done.equalization else {}),
        **{name: getattr(args, name) for name in ('report', 'sensitivity') if getattr(args, name)},
    }
    judged = 'others' if set(done.judged).isdisjoint(done.indices) else 'them'
    parts = [
        f'{args.model} -> {args.out}: {_megabytes(result["float_bytes"])} -> {_megabytes(result["bytes"])}',
        f'calibrated on {len(done.indices)} images of {result["folder"]} ({done.options.calibration}); of '
        f'{len(done.judged)} {judged} {done.agreement:.1f} % are classified as before',
        *([describe(done.equalization.counts)] if done.equalization else []),
        *([f'report in {args.report}'] if args.report else []),
        *([f'sensitivity in {args.sensitivity}, most sensitive:'] if args.sensitivity else []),
    ]
    table = f'\n{sensitivity_table(ranking, 5)}' if args.sensitivity else ''
    print_result(args, result, '; '.join(parts) + table)


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
        _options(args),
        args.latency_batches,
        args.threads,
        overrides_of(args),
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
