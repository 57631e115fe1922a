"""`compare-int8`: accuracy and speed of several models, in float32 and in each kind of INT8, in one table."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from statistics import median, quantiles
from typing import Any

import timm
import torch

from ..datasets import Images, core_count, open_evaluation
from ..reporting import cpu_name, lacks_vnni, markdown_table, package_versions, take_turns
from .classifier import Classifier, is_onnx, load_classifier, onnx_classifier
from .equalization import describe
from .evaluation import check_classes, classify, random_images, time_runs
from .onnx_export import float_onnx
from .quantization import PERCENTILE, WEIGHTS, QuantizationOptions, excluded_nodes, quantize_in
from .runtime import require

# Largest ratio of the 90th percentile to the median of steady times. On a machine with twice as many busy processes as
# cores the ratio is 1.2 to 3.2.
_STEADY = 1.25


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
        ways: How to quantize; they differ in weights, calibration (no `auto`) and equalization alone. The first way of
            each granularity is timed.
        latency_batches: Batch sizes to time, rounded up to multiples of the batch of a fixed-batch ONNX file.
        threads: Number of threads. Defaults to all cores.
        class_map: See `open_split`; the one that the models were trained with.

    Returns:
        Plain data: `settings`; `accuracy`, a row for each model and way with `top1`, `top5` and `drop` from float32 in
        points; `latency`, a row for each model and batch size with milliseconds, and `speedups` of each granularity
        over ONNX in float32, or None where times are not steady; `equalization`, what that did.

    Raises:
        FileNotFoundError: If there is no such model or folder.
        ValueError: If an image does not decode, a model has other classes than the folder, or cannot be quantized.
        ImportError: If the `[deploy]` extra is not installed.
    """
    accuracy, latency, equalization, counted = [], [], {}, {}
    loaded: dict[str, tuple[Any, Classifier, Images, Images]] = {}
    for label, source in models.items():
        model = float_onnx(source)
        float32 = onnx_classifier(model, threads)
        images, pool = (
            open_evaluation(data, split, float32.config, class_map, float32.class_names, need_split=True)
            for split in ('validation', 'train')
        )
        # Fail before the calibrations, which take long.
        check_classes(float32, images)
        excluded_nodes(model, ways[0].exclude)
        loaded[label] = model, float32, images, pool
    for label, (model, float32, images, pool) in loaded.items():
        source = models[label]
        # By equalization, weights and calibration.
        classifiers = {(False, 'float32', ''): float32}
        timed = {} if is_onnx(source) else {'pytorch': load_classifier(source, threads)}
        timed['float32'] = float32
        for done in quantize_in(ways, model, pool):
            way = done.options
            if done.equalization:
                equalization[label] = done.equalization.counts
                if (key := (True, 'float32', '')) not in classifiers:
                    classifiers[key] = onnx_classifier(done.model, threads)
            quantized = onnx_classifier(done.quantized, threads)
            classifiers[way.equalize, way.weights, way.calibration] = quantized
            timed.setdefault(way.weights, quantized)
            counted = {'validation_images': len(images), 'calibration_images': len(done.indices)}
        found = classify(classifiers, images, title=f'{label}: evaluation')
        best = next(iter(found.values())).accuracy()
        for kind, each in found.items():
            row = {'model': label, **dict(zip(('equalized', 'weights', 'calibration'), kind))}
            row |= {'top1': each.accuracy(), 'top5': each.accuracy(5), 'drop': best - each.accuracy()}
            accuracy.append(row)
        for batch in dict.fromkeys(map(float32.images_for, latency_batches)):
            latency.append({'model': label, 'batch': batch, **_latency(timed, batch)})
    settings = {
        **counted,
        **{name: getattr(ways[0], name) for name in ('seed', 'reduce_range', 'exclude')},
        'threads': threads or core_count(),
        'cpu': cpu_name() + ', no VNNI' * lacks_vnni(),
        'versions': package_versions(require('onnxruntime'), torch, timm),
    }
    return {'settings': settings, 'accuracy': accuracy, 'latency': latency, 'equalization': equalization}


def _latency(classifiers: Mapping[str, Classifier], batch: int) -> dict[str, Any]:
    images = random_images(classifiers['float32'].config, batch)
    runs = {name: partial(time_runs, partial(each.run, images), 0.3) for name, each in classifiers.items()}
    turns = take_turns(runs, 5)
    times = {name: [1000 * median(turn) for turn in found] for name, found in turns.items()}
    steady = {name: is_steady([*chain.from_iterable(found)]) for name, found in turns.items()}
    speedups: dict[str, float | None] = {}
    for kind in filter(times.__contains__, WEIGHTS):
        # Divides times of the same round.
        ratio = median(slow / fast for slow, fast in zip(times['float32'], times[kind]))
        speedups[kind] = ratio if steady['float32'] and steady[kind] else None
    return {'ms': {name: median(values) for name, values in times.items()}, 'speedups': speedups}


def is_steady(times: Sequence[float]) -> bool:
    """Returns whether times of single runs are worth comparing."""
    return quantiles(times, n=10, method='inclusive')[-1] <= _STEADY * median(times)


def comparison_table(results: Mapping[str, Any]) -> str:
    """Formats what `compare_int8` returned as Markdown."""
    settings = results['settings']
    parts = [
        f'Top-1 accuracy in percent on {settings["validation_images"]} images, and its drop from float32 in points; '
        f'calibrated on {settings["calibration_images"]} others, seed {settings["seed"]}, percentile {PERCENTILE}. '
        f'{settings["cpu"]}.',
        _accuracy_table(results['accuracy']),
        *(f'{label}: {describe(counts)}.' for label, counts in results['equalization'].items()),
    ]
    cells = []
    for row in results['latency']:
        for kind, ratio in row['speedups'].items():
            times = (row['ms'].get(name) for name in ('pytorch', 'float32', kind))
            texts = (f'{time:.2f}' if time else '' for time in times)
            cells.append([row['model'], str(row['batch']), kind, *texts, f'{ratio:.2f}x' if ratio else '-'])
    if cells:
        versions = ', '.join(f'{name} {version}' for name, version in settings['versions'].items())
        parts += [
            f'Milliseconds per batch, and how many times faster INT8 is: medians, measured in turn. '
            f'{settings["threads"]} threads, {versions}.',
            markdown_table(['model', 'batch', 'weights', 'PyTorch', 'ONNX float32', 'INT8', 'vs ONNX'], cells),
        ]
        if any(row[-1] == '-' for row in cells):
            parts.append(
                f'The times are not steady, their 90th percentile is over {_STEADY} times their median: speed-ups are '
                f'not stated. Repeat it on an idle machine.'
            )
    return '\n\n'.join(parts)


def _accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    found: dict[tuple[str, bool, str], dict[str, str]] = {}
    for row in rows:
        drop = '' if row['weights'] == 'float32' else f' ({0 - row["drop"]:+.2f})'
        cells = found.setdefault((row['model'], row['equalized'], row['weights']), {})
        cells[row['calibration']] = f'{row["top1"]:.2f}{drop}'
    body = [
        [model, weights + ', equalized' * equalized, found[model, equalized, 'float32'][''], *cells.values()]
        for (model, equalized, weights), cells in found.items()
        if weights != 'float32'
    ]
    calibrations = dict.fromkeys(row['calibration'] for row in rows if row['calibration'])
    return markdown_table(['model', 'weights', 'float32', *(f'INT8 {name}' for name in calibrations)], body)
