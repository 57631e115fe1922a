"""`compare-int8`: accuracy and speed of several models, in float32 and in each kind of INT8, in one table."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, compress, product
from statistics import median
from typing import Any

import timm
import torch

from ..datasets import open_evaluation
from ..reporting import cpu_name, markdown_table, package_versions, take_turns
from .classifier import Classifier, is_onnx, onnx_classifier, torch_classifier
from .equalization import describe
from .evaluation import UNSTEADY, check_classes, classify, is_steady, random_images, time_runs
from .onnx_export import float_onnx
from .quantization import PERCENTILE, WEIGHTS, QuantizationOptions, quantize_in
from .runtime import require
from .trained_model import load_model


def compare_int8(
    models: Mapping[str, str | os.PathLike],
    data: str | os.PathLike,
    ways: Sequence[QuantizationOptions],
    latency_batches: Sequence[int] = (1, 32),
    threads: int | None = None,
    class_map: str = '',
) -> dict[str, Any]:
    """Quantizes models in all ways, and measures each on the same images.

    Args:
        models: Label to `.onnx` file, or to what `load_model` takes.
        data: Image folder whose `train` split is calibrated on, and whose `validation` split is evaluated.
        ways: How to quantize, on the same images; no `auto`. The first way of each granularity is timed.
        latency_batches: Batch sizes to time, rounded up to multiples of the batch of a fixed-batch ONNX file.
        threads: Number of threads. Defaults to all cores.
        class_map: See `open_split`; the one that the models were trained with.

    Returns:
        Plain data: `settings`; `accuracy`, a row for each model and way with `top1`, `top5` and `drop` from float32 in
        points; `latency`, a row for each model and batch size with milliseconds, and `speedups` of each kind of INT8,
        medians of the ratios in the same round, or None where times are not steady; `equalization`, what that did.

    Raises:
        FileNotFoundError: If there is no such model or folder.
        ValueError: If an image does not decode, a model has other classes than the folder, or cannot be quantized.
        ImportError: If the `[deploy]` extra is not installed.
    """
    accuracy, latency, equalization, counted = [], [], {}, {}
    for label, source in models.items():
        model = float_onnx(source)
        float32 = onnx_classifier(model, threads)
        images, pool = (
            open_evaluation(data, split, float32.config, class_map, float32.class_names)
            for split in ('validation', 'train')
        )
        # Before the calibrations, which take long.
        check_classes(float32, images)
        classifiers: dict[tuple[bool, QuantizationOptions | None], Classifier] = {(False, None): float32}
        for done in quantize_in(ways, model, pool):
            if done.equalization:
                equalization[label] = done.equalization.counts
                classifiers.setdefault((True, None), onnx_classifier(done.model, threads))
            classifiers[done.options.equalize, done.options] = onnx_classifier(done.quantized, threads)
            counted = {'validation_images': len(images), 'calibration_images': len(done.indices)}
        found = classify(classifiers, images, title=f'{label}: evaluation')
        best = found[False, None].accuracy()
        for (equalized, way), each in found.items():
            row = {'model': label, 'weights': 'float32', 'calibration': '', 'target': '', 'equalized': equalized}
            if way:
                row |= {name: getattr(way, name) for name in ('weights', 'calibration', 'target')}
            row |= {'top1': each.accuracy(), 'top5': each.accuracy(5), 'drop': best - each.accuracy()}
            accuracy.append(row)
        timed = {} if is_onnx(source) else {'pytorch': torch_classifier(load_model(source), threads)}
        timed['float32'] = float32
        for way in ways:
            timed.setdefault(way.weights, classifiers[way.equalize, way])
        batches = dict.fromkeys(map(float32.images_for, latency_batches))
        latency += [_latency_row(label, timed, batch) for batch in batches]
    cpu, vnni = cpu_name()
    # The other options are counted, or varied.
    settings = {
        'percentile': PERCENTILE,
        **{name: getattr(ways[0], name) for name in ('seed', 'reduce_range', 'exclude')},
        **counted,
        'threads': threads or os.cpu_count(),
        'cpu': f'{cpu} {"with" if vnni else "without"} VNNI',
        'versions': package_versions(require('onnxruntime'), torch, timm),
    }
    return {'settings': settings, 'accuracy': accuracy, 'latency': latency, 'equalization': equalization}


def _latency_row(label: str, classifiers: Mapping[str, Classifier], batch: int) -> dict[str, Any]:
    images = random_images(classifiers['float32'].config, batch)
    runs = {name: partial(classifier.run, images) for name, classifier in classifiers.items()}
    turns = take_turns({name: partial(time_runs, run, 0.3) for name, run in runs.items()}, 5)
    times = {name: [median(turn) for turn in found] for name, found in turns.items()}
    steady = {name: is_steady([*chain.from_iterable(found)]) for name, found in turns.items()}
    speedups: dict[str, dict[str, float | None]] = {}
    for kind, base in product(WEIGHTS, ('pytorch', 'float32')):
        if kind in times and base in times:
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
        f'calibrated on {settings["calibration_images"]} others, seed {settings["seed"]}, percentile {PERCENTILE}.',
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
    for row in rows:
        for kind, speedups in row['speedups'].items():
            times = (row['ms'].get(name) for name in ('pytorch', 'float32', kind))
            ratios = (speedups.get(base, '') for base in ('pytorch', 'float32'))
            cells = [
                *('' if time is None else f'{time:.2f}' for time in times),
                *('-' if ratio is None else ratio and f'{ratio:.2f}x' for ratio in ratios),
            ]
            size = f'{row["bytes"]["float32"] / 1e6:.1f} -> {row["bytes"][kind] / 1e6:.1f}'
            body.append([row['model'], str(row['batch']), kind, *cells, size])
    head = ['model', 'batch', 'weights', 'PyTorch', 'ONNX float32', 'INT8', 'vs PyTorch', 'vs ONNX', 'MB']
    return markdown_table(head, body)
