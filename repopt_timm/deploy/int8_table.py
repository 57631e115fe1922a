"""`compare-int8`: accuracy and speed of several models, in float32 and in each kind of INT8, in one table."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, compress, product
from statistics import median
from typing import Any

import timm
import torch

from ..datasets import open_evaluation
from ..reporting import cpu_name, markdown_table, package_versions
from .classifier import Classifier, is_onnx, onnx_classifier, torch_classifier
from .equalization import describe, equalize
from .evaluation import UNSTEADY, alternate, check_classes, classify, is_steady, random_images
from .onnx_export import float_onnx
from .quantization import CALIBRATIONS, WEIGHTS, QuantizationOptions, calibrate, draw, quantize
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
        float32 = onnx_classifier(model, threads, overrides)
        folders = class_map, float32.class_names
        images = open_evaluation(data, 'validation', float32.config, *folders)
        pool = open_evaluation(calibration_data or data, 'train', float32.config, *folders)
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
        found = classify(classifiers, images, title=f'{label}: evaluation')
        best = found['float32', '', '', False].accuracy()
        for way, each in found.items():
            row = {'top1': each.accuracy(), 'top5': each.accuracy(5), 'drop': best - each.accuracy()}
            named = dict(zip(('weights', 'calibration', 'target', 'equalized'), way))
            accuracy.append({'model': label, **named, **row})
        timed = {} if is_onnx(source) else {'pytorch': torch_classifier(load_model(source), threads)}
        # Calibration and equalizing change values, not the work.
        timed['float32'] = float32
        timed |= {kind: classifiers[kind, calibrations[0], targets[0], False] for kind in weights}
        batches = dict.fromkeys(map(float32.images_for, latency_batches))
        latency += [_latency_row(label, timed, batch) for batch in batches]
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


def _latency_row(label: str, classifiers: Mapping[str, Classifier], batch: int) -> dict[str, Any]:
    images = random_images(classifiers['float32'].config, batch)
    turns = alternate({name: partial(classifier.run, images) for name, classifier in classifiers.items()})
    times = {name: [median(turn) for turn in found] for name, found in turns.items()}
    steady = {name: is_steady([*chain.from_iterable(found)]) for name, found in turns.items()}
    bases = [name for name in ('pytorch', 'float32') if name in times]
    speedups: dict[str, dict[str, float | None]] = {}
    for kind, base in product((kind for kind in WEIGHTS if kind in times), bases):
        ratio = median(slow / fast for slow, fast in zip(times[base], times[kind]))
        speedups.setdefault(kind, {})[base] = ratio if steady[base] and steady[kind] else None
    return {
        'model': label,
        'batch': batch,
        'ms': {name: 1000 * median(values) for name, values in times.items()},
        'speedups': speedups,
        'bytes': {name: classifier.size for name, classifier in classifiers.items()},
    }


def comparison_table(results: Mapping[str, Any]) -> str:
    """Formats what `compare_int8` returned as Markdown."""
    settings = results['settings']
    parts = [
        f'Top-1 accuracy in percent on {settings["validation_images"]} images, and its drop from float32 in points; '
        f'calibrated on {settings["calibration_images"]} others, seed {settings["seed"]}, percentile '
        f'{settings["percentile"]}.',
        _accuracy_table(results['accuracy']),
        *(f'{label}: {describe(counts)}.' for label, counts in results['equalization'].items()),
    ]
    if results['latency']:
        versions = ', '.join(f'{name} {version}' for name, version in settings['versions'].items())
        parts += [
            f'Milliseconds per batch, and how many times faster INT8 is: medians, measured in turn. {settings["cpu"]}, '
            f'{settings["threads"]} threads, {versions}.',
            _latency_table(results['latency']),
        ]
        if any(None in speedups.values() for row in results['latency'] for speedups in row['speedups'].values()):
            parts.append(UNSTEADY)
    return '\n\n'.join(parts)


def _accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    reference = {(row['model'], row['equalized']): f'{row["top1"]:.2f}' for row in rows if row['weights'] == 'float32'}
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        if row['weights'] != 'float32':
            key = row['model'], row['equalized'], row['target'], row['weights']
            cells.setdefault(key, {})[row['calibration']] = f'{row["top1"]:.2f} ({0 - row["drop"]:+.2f})'
    # Columns in which all rows are the same say nothing.
    several = [True, *(len({key[place] for key in cells}) > 1 for place in (1, 2)), True]
    body = [
        [*compress((model, 'yes' if equalized else '', *way), several), reference[model, equalized], *found.values()]
        for (model, equalized, *way), found in cells.items()
    ]
    calibrations = (f'INT8 {name}' for name in next(iter(cells.values())))
    head = compress(('model', 'equalized', 'target', 'weights'), several)
    return markdown_table([*head, 'float32', *calibrations], body)


def _latency_table(rows: Sequence[Mapping[str, Any]]) -> str:
    body = []
    for row, kind in [(each, kind) for each in rows for kind in each['speedups']]:
        times = (row['ms'].get(name) for name in ('pytorch', 'float32', kind))
        cells = [row['model'], str(row['batch']), kind, *('' if time is None else f'{time:.2f}' for time in times)]
        for base in ('pytorch', 'float32'):
            ratio = row['speedups'][kind].get(base, '')
            cells.append(ratio if ratio == '' else '-' if ratio is None else f'{ratio:.2f}x')
        body.append([*cells, f'{row["bytes"]["float32"] / 1e6:.1f} -> {row["bytes"][kind] / 1e6:.1f}'])
    head = ['model', 'batch', 'weights', 'PyTorch', 'ONNX float32', 'INT8', 'vs PyTorch', 'vs ONNX', 'MB']
    return markdown_table(head, body)
