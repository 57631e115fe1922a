"""The commands export, quantize, compare-int8, evaluate and predict, and their arguments."""

import argparse
import json
import logging
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

from ..console import number
from ..files import check_output, check_output_folder, write_text
from ..reporting import add_command, print_result
from .channel_health import health_warnings, kernel_outliers
from .equalization import describe
from .evaluation import evaluate, predict, worst_classes, write_csv
from .int8_table import compare_int8, comparison_table
from .layer_sensitivity import layer_sensitivity, sensitivity_table
from .onnx_export import OPSET, export_onnx
from .quantization import CALIBRATIONS, TARGETS, WEIGHTS, QuantizationOptions, quantize_onnx
from .runtime import require, save_onnx

_logger = logging.getLogger(__name__)

_MODEL = 'checkpoint or folder of a run, folder in the format of timm, or name for timm.create_model'
_MOST_CLASSES = 20
_PREPROCESSING = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


def add_commands(commands: Any) -> None:
    """Adds the five commands of deployment to `repopt-timm`."""
    export = add_command(commands, 'export', _export)
    quantized = add_command(commands, 'quantize', _quantize)
    compared = add_command(commands, 'compare-int8', _compare)
    evaluated = add_command(commands, 'evaluate', _evaluate)
    predicted = add_command(commands, 'predict', _predict)
    export.add_argument('model', help=_MODEL)
    for parser in (quantized, evaluated):
        parser.add_argument('model', help=f'{_MODEL}, or .onnx file')
    for parser in (quantized, compared, evaluated):
        text = 'folder of images, <class>/..., or one with a folder for each split'
        parser.add_argument('--data', metavar='DIR', required=True, help=text)
        add_class_map(parser)

    count = number(int, low=1)
    add = export.add_argument
    add('--onnx', metavar='FILE', type=_onnx_file, required=True, help='file to write')
    add('--opset', type=number(int, low=OPSET), default=OPSET, help=f"version of ONNX's operators, {OPSET} or later")
    add('--fixed-batch', type=count, help='take N images at a time, no other number')
    add('--fp16', action='store_true', help='weights and computation in float16')

    add = quantized.add_argument
    add('--split', default='train', help='split to calibrate on')
    add('--out', metavar='FILE', type=_onnx_file, required=True, help='file to write')
    add('--weights', choices=WEIGHTS, default=WEIGHTS[0], help='one scale per output channel, or one per tensor')
    ways = (*CALIBRATIONS, 'auto')
    add('--calibration', choices=ways, default='minmax', help='how to find activation ranges; auto tries all')
    add('--target', choices=TARGETS, default=TARGETS[0], help='runtime; ort is for OpenVINO too')
    add('--sensitivity', metavar='DIR', type=Path, help='write what each layer alone costs in INT8')

    add = compared.add_argument
    add('models', nargs='+', metavar='[LABEL=]MODEL', help=f'{_MODEL}, or .onnx file')
    add('--out', metavar='DIR', type=Path, help='write int8.md and int8.json')
    add('--calibrations', nargs='+', choices=CALIBRATIONS, default=tuple(CALIBRATIONS), help='calibrations to measure')
    add('--latency-batches', nargs='*', type=count, default=(1, 32), help='batch sizes to time')

    for parser in (quantized, compared):
        add = parser.add_argument
        add('--equalize', action='store_true', help='remove dead channels and equalize layers; no logit changes')
        add('--images', type=count, default=512, help='images to calibrate on')
        add('--seed', type=int, default=0, help='seed for choosing calibration images')
        add('--reduce-range', action='store_true', help='7-bit weights, for x86 without VNNI')
        add('--exclude', nargs='+', default=[], metavar='LAYER', help="left in float32: head.fc, 'stages.3.*', Add")

    add = evaluated.add_argument
    add('--split', default='validation', help='split to evaluate')
    add('-b', '--batch-size', type=count, default=32, help='images at a time')
    add('--threads', type=count, help='threads of the model, at most one for each core [all cores]')
    add('--out', metavar='DIR', type=Path, help='write classes.csv, confusion.csv and confusion.png')

    add = predicted.add_argument
    add('images', nargs='+', metavar='IMAGE', help='file, or folder of images')
    add('--model', required=True, help=f"{_MODEL} such as 'hf-hub:user/repo', or .onnx file")
    add('--top', type=count, default=5, help='classes to show')
    add('--csv', metavar='FILE', help='write a table with a row for each image')

    for parser in (export, quantized, evaluated, predicted):
        add = parser.add_argument_group("preprocessing, where it differs from the model's own").add_argument
        add('--input-size', nargs=3, type=count, metavar=('C', 'H', 'W'), help='size of the images')
        add('--mean', nargs='+', type=float, help='mean pixel value, or one for each channel')
        add('--std', nargs='+', type=float, help='standard deviation of pixel values, or one for each channel')
        interpolations = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
        add('--interpolation', choices=interpolations, help='resize interpolation')
        add('--crop-pct', type=number(float, above=0), help='share of the resized image that the crop keeps')
        add('--crop-mode', choices=('center', 'squash', 'border'), help='way to crop')


def add_class_map(parser: argparse.ArgumentParser) -> None:
    """Adds `--class-map` to a command that reads labelled images."""
    help_text = 'class map used in training; needed only for a model that does not name its classes'
    parser.add_argument('--class-map', default='', metavar='FILE', help=help_text)


def _onnx_file(text: str) -> str:
    if Path(text).suffix != '.onnx':
        raise argparse.ArgumentTypeError(f"'{text}' does not end in .onnx, by which other commands know such files")
    return text


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _PREPROCESSING if getattr(args, name) is not None}


def _options(args: argparse.Namespace, **chosen: Any) -> QuantizationOptions:
    given = {field.name: getattr(args, field.name) for field in fields(QuantizationOptions) if field.name in args}
    return QuantizationOptions(**{**given, 'exclude': tuple(args.exclude), **chosen})


def _export(args: argparse.Namespace) -> None:
    check_output(args.onnx, args.model)
    form = {'opset': args.opset, 'batch': args.fixed_batch or 0, 'half': args.fp16}
    result = export_onnx(args.model, args.onnx, _overrides(args), **form)
    for line in health_warnings({}, result['outliers'], result['still_channels']):
        _logger.warning(line)
    left = f', {result["batchnorms"]} BatchNorms without a convolution before them' if result['batchnorms'] else ''
    text = (
        f'{args.model} -> {args.onnx}: {result["bytes"] / 1e6:.1f} MB, opset {result["opset"]}{left}; logits within '
        f'{result["difference"]:.1e} of PyTorch, relative to the largest'
    )
    print_result(args, result, text)


def _quantize(args: argparse.Namespace) -> None:
    check_output(args.out, args.model)
    if args.sensitivity:
        check_output_folder(args.sensitivity)
    done = quantize_onnx(args.model, args.data, _options(args), args.split, _overrides(args), args.class_map)
    for line in done.warnings():
        _logger.warning(line)
    result = {
        'out': args.out,
        'bytes': done.quantized.ByteSize(),
        'float_bytes': done.model.ByteSize(),
        'images': len(done.indices),
        'folder': str(done.images.folder),
        'calibration': done.options.calibration,
        'agreement': done.agreement,
        'logits_snr_db': done.logits_snr_db,
        'dead_channels': done.dead,
        'outliers': kernel_outliers(done.model),
    }
    others = set(done.judged).isdisjoint(done.indices)
    judged = f'{len(done.judged)} other images' if others else f'these {len(done.judged)} images'
    lines = [
        f'{args.model} -> {args.out}: {result["float_bytes"] / 1e6:.1f} MB -> {result["bytes"] / 1e6:.1f} MB',
        f'calibrated on {result["images"]} images of {result["folder"]} ({result["calibration"]}); '
        f'{done.agreement:.1f} % of {judged} are classified as before',
    ]
    if done.equalization:
        result['equalization'] = done.equalization.counts
        lines.append(describe(done.equalization.counts))
    # Before the sensitivity, so that an error in it does not lose the file.
    save_onnx(done.quantized, args.out)
    if args.sensitivity:
        ranking = layer_sensitivity(done)
        write_text(args.sensitivity / 'sensitivity.json', json.dumps(ranking, indent=2) + '\n')
        write_text(args.sensitivity / 'sensitivity.md', sensitivity_table(ranking) + '\n')
        lines.append(f'sensitivity in {args.sensitivity}, most sensitive:\n{sensitivity_table(ranking, 5)}')
    print_result(args, result, '; '.join(lines))


def _compare(args: argparse.Namespace) -> None:
    models = {}
    for text in args.models:
        label, separator, source = text.partition('=')
        if not separator or Path(text).exists():
            label, source = '/'.join(Path(text).parts[-2:]), text
        models[label] = source
    if len(models) < len(args.models):
        raise ValueError('Two models have the same label: name them as LABEL=MODEL.')
    if args.out:
        check_output_folder(args.out)
    kinds = product(dict.fromkeys((False, args.equalize)), args.calibrations, WEIGHTS)
    ways = [
        _options(args, equalize=equalize, calibration=calibration, weights=weights)
        for equalize, calibration, weights in kinds
    ]
    results = compare_int8(models, args.data, ways, args.latency_batches, class_map=args.class_map)
    table = comparison_table(results)
    if args.out:
        write_text(args.out / 'int8.md', table + '\n')
        write_text(args.out / 'int8.json', json.dumps(results, indent=2) + '\n')
    print_result(args, results, table)


def _evaluate(args: argparse.Namespace) -> None:
    if args.out:
        require('matplotlib')
        require('sklearn')
        check_output_folder(args.out)
    result = evaluate(
        args.model, args.data, args.split, args.batch_size, args.threads, _overrides(args), args.class_map, args.out
    )
    lines = [
        f'top-1       {result["top1"]:.2f} %',
        f'top-5       {result["top5"]:.2f} %  of {result["images"]} images',
        f'ties        {result["ties"]} images have two equal largest logits; the lower class counts',
        f'latency     {result["latency_ms"]:.2f} ms median, {result["latency_p90_ms"]:.2f} ms p90 at batch '
        f'{result["latency_batch"]}',
        f'throughput  {result["throughput"]:.0f} images/s at batch {result["batch_size"]}',
        f'size        {result["bytes"] / 1e6:.1f} MB, {result["backend"]}',
        '',
    ]
    seen = [row for row in result['classes'] if row['images']]
    if len(seen) > _MOST_CLASSES:
        lines += [f'The {_MOST_CLASSES} classes of the lowest accuracy; --out writes all of them.', '']
    print_result(args, result, '\n'.join([*lines, worst_classes(seen, _MOST_CLASSES)]))


def _predict(args: argparse.Namespace) -> None:
    if args.csv:
        check_output(args.csv, args.model, *args.images)
    rows = predict(args.model, args.images, args.top, _overrides(args))
    if args.csv:
        places = range(1, len(rows[0]['classes']) + 1)
        head = ['image', *(f'{name}_{place}' for place in places for name in ('class', 'name', 'probability'))]
        cells = ([row['image'], *(value for best in row['classes'] for value in best.values())] for row in rows)
        write_csv(args.csv, head, cells)
    lines = []
    for row in rows:
        best = (f'{each["name"] or each["class"]} {100 * each["probability"]:.2f} %' for each in row['classes'])
        lines.append(f'{row["image"]}: {", ".join(best)}')
    print_result(args, {'model': args.model, 'images': rows}, '\n'.join(lines))
