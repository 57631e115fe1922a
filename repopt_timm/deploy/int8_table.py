"""`compare-int8`: accuracy and speed of several models, in float32 and in each kind of INT8, in one table."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import timm
import torch

from ..reporting import cpu_name, markdown_table
from .classifier import Classifier, data_config, is_onnx, onnx_classifier, torch_classifier
from .evaluation import accuracies, alternate, check_classes, random_images
from .image_folder import ImageFolder
from .onnx_export import float_onnx
from .quantization import CALIBRATIONS, WEIGHTS, QuantizationOptions, calibrate, quantize
from .runtime import require
from .trained_model import load_model

__all__ = ['compare_int8', 'comparison_table']


def compare_int8(
    models: Mapping[str, str | os.PathLike],
    data: str | os.PathLike,
    calibration_data: str | os.PathLike | None = None,
    weights: Sequence[str] = WEIGHTS,
    calibrations: Sequence[str] = CALIBRATIONS,
    options: QuantizationOptions | None = None,
    latency_batches: Sequence[int] = (1, 32),
    threads: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    class_map: str = '',
) -> dict[str, Any]:
    """Quantises models in all ways, and measures each on the same images.

    Args:
        models: Label to `.onnx` file, or to what `load_model` takes.
        data: Image folder whose `validation` split is evaluated.
        calibration_data: Image folder whose `train` split is calibrated on. Defaults to `data`.
        weights: Granularities to try.
        calibrations: Calibrations to try.
        options: Everything else.
        latency_batches: Batch sizes to time.
        threads: Number of threads. Defaults to all cores.
        overrides: Preprocessing that differs from the models' own, by timm's names.
        class_map: See `ImageFolder`; the one that the models were trained with.

    Returns:
        Plain data: `settings`; `accuracy`, a row for each model and kind with `top1`, `top5` and `drop` from float32 in
        points; `latency`, a row for each model and batch size with milliseconds, and `speedups` of each kind of INT8,
        medians of the ratios in the same round.

    Raises:
        FileNotFoundError: If there is no such model or folder.
        ValueError: If an image does not decode, a model has other classes than the folder, or cannot be quantised.
        ImportError: If the `[deploy]` extra is not installed.
    """
    options = options or QuantizationOptions()
    accuracy: list[dict[str, Any]] = []
    latency: list[dict[str, Any]] = []
    counted: dict[str, int] = {}
    for label, source in models.items():
        model = float_onnx(source, overrides)
        config = data_config(model, overrides)
        images = ImageFolder(data, 'validation', config, class_map)
        pool = ImageFolder(data if calibration_data is None else calibration_data, 'train', config)
        indices = pool.sample(options.images, options.seed)
        counted = {'validation_images': len(images), 'calibration_images': len(indices)}
        classifiers = {('float32', ''): onnx_classifier(model, threads, overrides)}
        # Before the calibrations, which take long.
        check_classes(classifiers['float32', ''], images)
        for calibration in calibrations:
            ranges = calibrate(model, pool, indices, replace(options, calibration=calibration))
            for kind in weights:
                quantized = quantize(model, ranges, replace(options, weights=kind))
                classifiers[kind, calibration] = onnx_classifier(quantized, threads, overrides)
        accuracy += _accuracy_rows(label, classifiers, images)
        timed: dict[str, Classifier] = {}
        if not is_onnx(source):
            timed['pytorch'] = torch_classifier(load_model(source), threads)
        timed['float32'] = classifiers['float32', '']
        # Calibration changes values, not the work.
        timed |= {kind: classifiers[kind, calibrations[0]] for kind in weights}
        latency += [_latency_row(label, timed, config, batch) for batch in latency_batches]
    # The others are counted, or varied.
    fixed = {name: getattr(options, name) for name in ('percentile', 'seed', 'reduce_range', 'exclude')}
    settings = {**fixed, **counted, **_machine(threads)}
    return {'settings': settings, 'accuracy': accuracy, 'latency': latency}


def _accuracy_rows(
    label: str, classifiers: Mapping[tuple[str, str], Classifier], images: ImageFolder
) -> list[dict[str, Any]]:
    named = {'/'.join(key): classifier for key, classifier in classifiers.items()}
    found = accuracies(named, images, title=f'{label}: evaluation')
    reference = found['float32/'][0]
    rows = []
    for weights, calibration in classifiers:
        top1, top5 = found[f'{weights}/{calibration}']
        row = {'model': label, 'weights': weights, 'calibration': calibration, 'top1': top1, 'top5': top5}
        rows.append(row if weights == 'float32' else {**row, 'drop': reference - top1})
    return rows


def _latency_row(
    label: str, classifiers: Mapping[str, Classifier], config: Mapping[str, Any], batch: int
) -> dict[str, Any]:
    images = random_images(config, batch)
    runs = {name: (lambda classifier=classifier: classifier.run(images)) for name, classifier in classifiers.items()}
    times = alternate(runs)
    speedups = {
        kind: {
            base: median(slow / fast for slow, fast in zip(times[base], times[kind]))
            for base in ('pytorch', 'float32')
            if base in times
        }
        for kind in WEIGHTS
        if kind in times
    }
    milliseconds = {name: 1000 * median(values) for name, values in times.items()}
    sizes = {name: classifier.size for name, classifier in classifiers.items()}
    return {'model': label, 'batch': batch, 'ms': milliseconds, 'speedups': speedups, 'bytes': sizes}


def _machine(threads: int | None) -> dict[str, Any]:
    cpu, vnni = cpu_name()
    return {
        'threads': threads or os.cpu_count(),
        'cpu': f'{cpu} {"with" if vnni else "without"} VNNI',
        'versions': {
            'onnxruntime': require('onnxruntime').__version__,
            'torch': torch.__version__,
            'timm': timm.__version__,
        },
    }


def comparison_table(results: Mapping[str, Any]) -> str:
    """Formats what `compare_int8` returned as Markdown."""
    settings = results['settings']
    lines = [
        f'Top-1 accuracy in percent on {settings["validation_images"]} images, and its drop from float32 in points; '
        f'calibrated on {settings["calibration_images"]} others, seed {settings["seed"]}, percentile '
        f'{settings["percentile"]}.',
        '',
        _accuracy_table(results['accuracy']),
    ]
    if results['latency']:
        versions = ', '.join(f'{name} {version}' for name, version in settings['versions'].items())
        lines += [
            '',
            f'Milliseconds per batch, and how many times faster INT8 is: medians, measured in turn. {settings["cpu"]}, '
            f'{settings["threads"]} threads, {versions}.',
            '',
            _latency_table(results['latency']),
        ]
    return '\n'.join(lines)


def _accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    calibrations = list(dict.fromkeys(row['calibration'] for row in rows if row['calibration']))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    reference = {row['model']: row['top1'] for row in rows if row['weights'] == 'float32'}
    for row in rows:
        if row['weights'] != 'float32':
            cell = f'{row["top1"]:.2f} ({0 - row["drop"]:+.2f})'
            cells.setdefault((row['model'], row['weights']), {})[row['calibration']] = cell
    body = [
        [model, weights, f'{reference[model]:.2f}', *(found[calibration] for calibration in calibrations)]
        for (model, weights), found in cells.items()
    ]
    return markdown_table(['model', 'weights', 'float32', *(f'INT8 {name}' for name in calibrations)], body)


def _latency_table(rows: Sequence[Mapping[str, Any]]) -> str:
    body = []
    for row in rows:
        milliseconds, sizes = row['ms'], row['bytes']
        for kind, speedups in row['speedups'].items():
            values = [milliseconds.get('pytorch'), milliseconds['float32'], milliseconds[kind]]
            ratios = [speedups.get('pytorch'), speedups['float32']]
            body.append(
                [
                    row['model'],
                    str(row['batch']),
                    kind,
                    *('' if value is None else f'{value:.2f}' for value in values),
                    *('' if ratio is None else f'{ratio:.2f}x' for ratio in ratios),
                    f'{sizes["float32"] / 1e6:.1f} -> {sizes[kind] / 1e6:.1f}',
                ]
            )
    head = ['model', 'batch', 'weights', 'PyTorch', 'ONNX float32', 'INT8', 'vs PyTorch', 'vs ONNX', 'MB']
    return markdown_table(head, body)
