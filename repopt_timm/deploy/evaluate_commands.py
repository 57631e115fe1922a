"""The commands `evaluate` and `predict`, and the arguments that all commands share which run a model."""

import argparse
import logging
from typing import Any

from ..files import check_output, check_output_folder
from ..plot import figure_class
from ..reporting import add_command, markdown_table, positive, print_result
from .evaluation import UNSTEADY, evaluate, sklearn_metrics, write_csv
from .prediction import predict

__all__ = [
    'DATA_HELP',
    'MODEL_HELP',
    'add_class_map',
    'add_commands',
    'add_preprocessing',
    'add_threads',
    'overrides_of',
]

_logger = logging.getLogger(__name__)

MODEL_HELP = 'checkpoint or folder of a run, folder in the format of timm, or name for timm.create_model'
DATA_HELP = 'folder of images, <class>/..., or one with a folder for each split'
_MOST_CLASSES = 20
_PREPROCESSING = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


def add_commands(commands: Any) -> None:
    """Adds evaluate and predict to the commands of `repopt-timm`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    evaluated = add_command(commands, 'evaluate', _evaluate)
    evaluated.add_argument('model', help=f'{MODEL_HELP}, or .onnx file')
    evaluated.add_argument('--data', metavar='DIR', required=True, help=DATA_HELP)
    evaluated.add_argument('--split', default='validation', help='split to evaluate')
    add_class_map(evaluated)
    evaluated.add_argument('-b', '--batch-size', type=positive(int), default=32, metavar='N', help='images at a time')
    evaluated.add_argument('--out', metavar='DIR', help='write classes.csv, confusion.csv and confusion.png')
    predicted = add_command(commands, 'predict', _predict)
    predicted.add_argument('images', nargs='+', metavar='IMAGE', help='file, or folder of images')
    predicted.add_argument('--model', required=True, help=f"{MODEL_HELP} such as 'hf-hub:user/repo', or .onnx file")
    predicted.add_argument('--top', type=positive(int), default=5, metavar='N', help='classes to show')
    predicted.add_argument('--csv', metavar='FILE', help='write a table with a row for each image')
    for parser in (evaluated, predicted):
        add_threads(parser)
        add_preprocessing(parser)


def add_class_map(parser: argparse.ArgumentParser) -> None:
    """Adds `--class-map` to a command that reads labelled images."""
    help_text = 'class map used in training; needed only for a model that does not name its classes'
    parser.add_argument('--class-map', default='', metavar='FILE', help=help_text)


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Adds `--threads` to a command that runs a model."""
    help_text = 'threads of the model, at most one for each core [all cores]'
    parser.add_argument('--threads', type=positive(int), metavar='N', help=help_text)


def add_preprocessing(parser: argparse.ArgumentParser) -> None:
    """Adds preprocessing that differs from the model's own to a command, for `overrides_of`."""
    add = parser.add_argument_group("preprocessing, where it differs from the model's own").add_argument
    size_help = 'channels, height and width of the images'
    add('--input-size', nargs=3, type=positive(int), metavar=('C', 'H', 'W'), help=size_help)
    add('--mean', nargs='+', type=float, help='mean pixel value, or one for each channel')
    add('--std', nargs='+', type=float, help='standard deviation of pixel values, or one for each channel')
    interpolations = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
    add('--interpolation', choices=interpolations, help='resize interpolation')
    add('--crop-pct', type=positive(float), help='share of the resized image that the crop keeps')
    add('--crop-mode', choices=('center', 'squash', 'border'), help='way to crop')


def overrides_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the preprocessing that was given, by timm's names."""
    return {name: getattr(args, name) for name in _PREPROCESSING if getattr(args, name) is not None}


def _evaluate(args: argparse.Namespace) -> None:
    if args.out:
        figure_class()
        sklearn_metrics()
        check_output_folder(args.out)
    result = evaluate(
        args.model, args.data, args.split, args.batch_size, args.threads, overrides_of(args), args.class_map, args.out
    )
    lines = [
        f'top-1       {result["top1"]:.2f} %',
        f'top-5       {result["top5"]:.2f} %  of {result["images"]} images',
        f'latency     {result["latency_ms"]:.2f} ms median, {result["latency_p90_ms"]:.2f} ms p90 at batch '
        f'{result["latency_batch"]}',
        f'throughput  {result["throughput"]:.0f} images/s at batch {result["batch_size"]}',
        f'size        {result["bytes"] / 1e6:.1f} MB, {result["backend"]}',
    ]
    if result['ties']:
        lines.insert(2, f'ties        {result["ties"]} images have two equal largest logits; the lower class counts')
    if not result['steady']:
        _logger.warning(UNSTEADY)
    seen = sorted((row for row in result['classes'] if row['images']), key=lambda row: row['accuracy'])
    if len(seen) > _MOST_CLASSES:
        lines += ['', f'The {_MOST_CLASSES} classes of the lowest accuracy; --out writes all of them.']
    if seen:
        rows = [
            [row['class'], str(row['images']), f'{row["accuracy"]:.2f}', row['confused_with'], str(row['confused'])]
            for row in seen[:_MOST_CLASSES]
        ]
        lines += [
            '',
            markdown_table(['class', 'images', 'top-1 %', 'most often taken for', 'images'], rows, align=True),
        ]
    print_result(args, result, '\n'.join(lines))


def _predict(args: argparse.Namespace) -> None:
    if args.csv:
        check_output(args.csv, args.model, *args.images)
    rows = predict(args.model, args.images, args.top, args.threads, overrides_of(args))
    if args.csv:
        first = rows[0]['classes']
        head = ['image', *(f'{name}_{place}' for place in range(1, len(first) + 1) for name in first[0])]
        write_csv(
            args.csv, head, ([row['image'], *(v for best in row['classes'] for v in best.values())] for row in rows)
        )
    lines = []
    for row in rows:
        best = (f'{each["name"] or each["class"]} {100 * each["probability"]:.2f} %' for each in row['classes'])
        lines.append(f'{row["image"]}: {", ".join(best)}')
    print_result(args, {'model': args.model, 'images': rows}, '\n'.join(lines))
