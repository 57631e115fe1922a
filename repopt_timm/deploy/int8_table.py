"""`compare-int8`: accuracy and speed of several models, in float32 and in each kind of INT8, in one table."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, compress, product
from statistics import median
from typing import Any

import timm
import torch

from ..datasets import open_evaluation
from ..reporting import cpu_name, markdown_table, package_versions
from .classifier import Classifier, data_config, is_onnx, onnx_classifier, torch_classifier
from .equalization import describe, equalize
from .evaluation import UNSTEADY, alternate, check_classes, classify, is_steady, random_images
from .onnx_export import float_onnx
from .quantization import CALIBRATIONS, WEIGHTS, QuantizationOptions, calibrate, draw, quantize
from .runtime import require
from .trained_model import load_model

__all__ = ['compare_int8', 'comparison_table']

# What a row of the accuracy table is about.
_WAY = ('weights', 'calibration', 'target', 'equalized')


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
    targets: Sequence[str] = ('ort',),
) -> dict[str, Any]:
    """Quantizes models in all ways, and measures each on the same images.

    Args:
        models: Label to `.onnx` file, or to what `load_model` takes.
        data: Image folder whose `validation` split is evaluated.
        calibration_data: Image folder whose `train` split is calibrated on. Defaults to `data`.
        weights: Granularities to try.
        calibrations: Calibrations to try.
        options: Everything else; with `equalize` each model is measured as it is, and equalized too.
        latency_batches: Batch sizes to time, rounded up to multiples of the batch of a fixed-batch ONNX file.
        threads: Number of threads. Defaults to all cores.
        overrides: Preprocessing that differs from the models' own, by timm's names.
        class_map: See `open_split`; the one that the models were trained with.
        targets: Forms to try, see `QuantizationOptions`. ONNX Runtime runs all of them; the first one is timed.

    Returns:
        Plain data: `settings`; `accuracy`, a row for each model and kind with `top1`, `top5` and `drop` from float32 in
        points; `latency`, a row for each model and batch size with milliseconds, and `speedups` of each kind of INT8,
        medians of the ratios in the same round, or None where times are not steady; `equalization`, what that did.

    Raises:
        FileNotFoundError: If there is no such model or folder.
        ValueError: If an image does not decode, a model has other classes than the folder, or cannot be quantized.
        ImportError: If the `[deploy]` extra is not installed.
    """
    options = options or QuantizationOptions()
    accuracy: list[dict[str, Any]] = []
    latency: list[dict[str, Any]] = []
    equalization: dict[str, Any] = {}
    counted: dict[str, int] = {}
    for label, source in models.items():
        model = float_onnx(source, overrides)
        config = data_config(model, overrides)
        float32 = onnx_classifier(model, threads, overrides)
        names = float32.class_names
        images = open_evaluation(data, 'validation', config, class_map, names)
        pool = open_evaluation(calibration_data or data, 'train', config, class_map, names)
        indices, others = draw(pool, options)
        counted = {'validation_images': len(images), 'calibration_images': len(indices)}
        # Before the calibrations, which take long.
        check_classes(float32, images)
        forms = {False: model}
        if options.equalize:
            done = equalize(model, pool, [*indices, *others[: len(indices)]], others[len(indices) :])
            forms[True], equalization[label] = done.model, done.counts
        classifiers: dict[tuple[Any, ...], Classifier] = {}
        for equalized, form in forms.items():
            classifiers['float32', '', '', equalized] = onnx_classifier(form, threads, overrides)
            for calibration in calibrations:
                chosen = replace(options, calibration=calibration)
                ranges = calibrate(form, pool, indices, chosen)
                for target, kind in product(targets, weights):
                    int8 = quantize(form, ranges, replace(chosen, weights=kind, target=target))
                    classifiers[kind, calibration, target, equalized] = onnx_classifier(int8, threads, overrides)
        named = {str(way): classifier for way, classifier in classifiers.items()}
        found = classify(named, images, title=f'{label}: evaluation')
        for way in classifiers:
            top1, top5 = (found[str(way)].accuracy(count) for count in (1, 5))
            drop = found[str(('float32', '', '', False))].accuracy() - top1
            accuracy.append({'model': label, **dict(zip(_WAY, way)), 'top1': top1, 'top5': top5, 'drop': drop})
        timed = {} if is_onnx(source) else {'pytorch': torch_classifier(load_model(source), threads)}
        # Calibration and equalizing change values, not the work.
        timed |= {
            'float32': float32,
            **{kind: classifiers[kind, calibrations[0], targets[0], False] for kind in weights},
        }
        batches = dict.fromkeys(map(float32.images_for, latency_batches))
        latency += [_latency_row(label, timed, config, batch) for batch in batches]
    cpu, vnni = cpu_name()
    # The other options are counted, or varied.
    settings = {
        **{name: getattr(options, name) for name in ('percentile', 'seed', 'reduce_range', 'exclude')},
        **counted,
        'threads': threads or os.cpu_count(),
        'cpu': f'{cpu} {"with" if vnni else "without"} VNNI',
        'versions': package_versions(require('onnxruntime'), torch, timm),
    }
    return {'settings': settings, 'accuracy': accuracy, 'latency': latency, 'equalization': equalization}


def _latency_row(
    label: str, classifiers: Mapping[str, Classifier], config: Mapping[str, Any], batch: int
) -> dict[str, Any]:
    images = random_images(config, batch)
    runs = {name: (lambda classifier=classifier: classifier.run(images)) for name, classifier in classifiers.items()}
    turns = alternate(runs)
    times = {name: [median(turn) for turn in found] for name, found in turns.items()}
    steady = {name: is_steady([*chain.from_iterable(found)]) for name, found in turns.items()}
    speedups = {
        kind: {
            base: median(slow / fast for slow, fast in zip(times[base], times[kind]))
            if steady[base] and steady[kind]
            else None
            for base in ('pytorch', 'float32')
            if base in times
        }
        for kind in WEIGHTS
        if kind in times
    }
    milliseconds = {name: 1000 * median(values) for name, values in times.items()}
    sizes = {name: classifier.size for name, classifier in classifiers.items()}
    return {'model': label, 'batch': batch, 'ms': milliseconds, 'speedups': speedups, 'bytes': sizes}


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
    for label, counts in results['equalization'].items():
        lines += ['', f'{label}: {describe(counts)}.']
    if results['latency']:
        versions = ', '.join(f'{name} {version}' for name, version in settings['versions'].items())
        lines += [
            '',
            f'Milliseconds per batch, and how many times faster INT8 is: medians, measured in turn. {settings["cpu"]}, '
            f'{settings["threads"]} threads, {versions}.',
            '',
            _latency_table(results['latency']),
        ]
        if any(None in speedups.values() for row in results['latency'] for speedups in row['speedups'].values()):
            lines += ['', UNSTEADY]
    return '\n'.join(lines)


def _accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    quantized = [row for row in rows if row['weights'] != 'float32']
    calibrations = list(dict.fromkeys(row['calibration'] for row in quantized))
    reference = {(row['model'], row['equalized']): f'{row["top1"]:.2f}' for row in rows if row['weights'] == 'float32'}
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in quantized:
        key = tuple(row[name] for name in ('model', 'equalized', 'target', 'weights'))
        cells.setdefault(key, {})[row['calibration']] = f'{row["top1"]:.2f} ({0 - row["drop"]:+.2f})'
    several = [len({row[name] for row in quantized}) > 1 for name in ('equalized', 'target')]
    head = ['model', *compress(['equalized', 'target'], several), 'weights', 'float32']
    body = [
        [
            model,
            *compress(['yes' if equalized else '', target], several),
            weights,
            reference[model, equalized],
            *(found[calibration] for calibration in calibrations),
        ]
        for (model, equalized, target, weights), found in cells.items()
    ]
    return markdown_table([*head, *(f'INT8 {name}' for name in calibrations)], body)


def _latency_table(rows: Sequence[Mapping[str, Any]]) -> str:
    body = []
    for row in rows:
        milliseconds, sizes = row['ms'], row['bytes']
        for kind, speedups in row['speedups'].items():
            times = (milliseconds.get(name) for name in ('pytorch', 'float32', kind))
            ratios = ((base in speedups, speedups.get(base)) for base in ('pytorch', 'float32'))
            body.append(
                [
                    row['model'],
                    str(row['batch']),
                    kind,
                    *('' if value is None else f'{value:.2f}' for value in times),
                    *(f'{ratio:.2f}x' if ratio else '-' if timed else '' for timed, ratio in ratios),
                    f'{sizes["float32"] / 1e6:.1f} -> {sizes[kind] / 1e6:.1f}',
                ]
            )
    head = ['model', 'batch', 'weights', 'PyTorch', 'ONNX float32', 'INT8', 'vs PyTorch', 'vs ONNX', 'MB']
    return markdown_table(head, body)
