"""Accuracy, latency, throughput and size of a model."""

import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from ..reporting import take_turns, time_call
from .classifier import Classifier, load_classifier
from .image_folder import ImageFolder

__all__ = [
    'UNSTEADY',
    'accuracies',
    'alternate',
    'check_classes',
    'check_labels',
    'check_logits',
    'evaluate',
    'is_steady',
    'random_images',
    'time_runs',
]

# The 90th percentile of times, of their median. With twice as many busy processes as cores it is 1.2 to 3.2.
_STEADY = 1.25

UNSTEADY = (
    f'The times are not steady, their 90th percentile is over {_STEADY} times their median: speed-ups are not stated. '
    'Repeat it on an idle machine.'
)


def evaluate(
    source: str | os.PathLike,
    data: str | os.PathLike,
    split: str = 'validation',
    batch_size: int = 32,
    threads: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    class_map: str = '',
) -> dict[str, Any]:
    """Evaluates a model on an image folder, on the CPU.

    Args:
        source: An `.onnx` file, or what `load_model` takes.
        data: Image folder, see `ImageFolder`.
        split: Its split.
        batch_size: Images in a batch, for accuracy and throughput.
        threads: Number of threads of the model. Defaults to all cores.
        overrides: Preprocessing that differs from the model's own, by timm's names.
        class_map: See `ImageFolder`; the one that the model was trained with.

    Returns:
        `model`, `backend`, `images`, `top1` and `top5` in percent (`top5` over as many classes as there are if fewer),
        `latency_ms` and `latency_p90_ms` of a batch of `latency_batch` images, which is one where the model takes one,
        `throughput` in images per second, at `batch_size`, whether these times are `steady`, and `bytes` on disk. The
        times exclude decoding.

    Raises:
        FileNotFoundError: If there is no such model or folder.
        ValueError: If an image does not decode, or model and folder have different classes.
    """
    classifier = load_classifier(source, threads, overrides)
    images = ImageFolder(data, split, classifier.config, class_map)
    top1, top5 = accuracies({'evaluation': classifier}, images, batch_size)['evaluation']
    latency_batch, batch_size = map(classifier.images_for, (1, batch_size))
    single = time_runs(_run(classifier, latency_batch))
    many = time_runs(_run(classifier, batch_size))
    return {
        'model': os.fspath(source),
        'backend': classifier.backend,
        'images': len(images),
        'top1': top1,
        'top5': top5,
        'latency_batch': latency_batch,
        'latency_ms': 1000 * median(single),
        'latency_p90_ms': 1000 * quantiles(single, n=10)[-1],
        'throughput': batch_size / median(many),
        'steady': is_steady(single) and is_steady(many),
        'batch_size': batch_size,
        'bytes': classifier.size,
    }


def accuracies(
    classifiers: Mapping[str, Classifier], images: ImageFolder, batch_size: int = 32, title: str = 'evaluation'
) -> dict[str, tuple[float, float]]:
    """Measures models with the same preprocessing in one pass over the images.

    Args:
        classifiers: Name to model.
        images: Images with labels.
        batch_size: Images in a batch.
        title: What the progress bar says.

    Returns:
        Name to top-1 and top-5 accuracy in percent.

    Raises:
        ValueError: If an image does not decode, or a model has other classes than the folder.
    """
    for classifier in classifiers.values():
        check_classes(classifier, images)
    hits = {name: [0, 0] for name in classifiers}
    for batch, targets in images.batches(range(len(images)), batch_size, title):
        for name, classifier in classifiers.items():
            logits = check_logits(classifier.run(batch))
            right = logits.topk(min(5, logits.shape[-1])).indices == targets[:, None]
            hits[name][0] += int(right[:, 0].sum())
            hits[name][1] += int(right.any(1).sum())
    return {name: (100 * top1 / len(images), 100 * top5 / len(images)) for name, (top1, top5) in hits.items()}


def check_logits(logits: Tensor) -> Tensor:
    """Returns logits that are numbers.

    Raises:
        ValueError: If they are not, which would count as the first class.
    """
    if not logits.isfinite().all():
        raise ValueError(
            'The model gives logits that are not finite, as after a training that diverged: it classifies nothing. '
            'Name an earlier checkpoint.'
        )
    return logits


def check_classes(classifier: Classifier, images: ImageFolder) -> None:
    """Raises a ValueError if the number or the order of a model's classes is not that of the folder."""
    classes = classifier.run(random_images(classifier.config, 1)).shape[-1]
    found, expected = images.class_names, classifier.class_names
    if classes != images.num_classes:
        raise ValueError(
            f"The model has {classes} classes, but the folder '{images.folder}' has {images.num_classes}. Name the "
            f'folder of the data set that it was trained on.'
        )
    numbers = _numbers(found)
    for name, number in _numbers(expected[: len(found)]).items():
        # Names of neither, such as WordNet's beside words, say nothing of the order.
        if numbers.get(name, number) != number:
            raise ValueError(
                f"Class {number} of the model is '{name}', but in the folder '{images.folder}' it is "
                f"'{found[number]}'. Give the --class-map that the model was trained with."
            )


def _numbers(names: Sequence[str]) -> dict[str, int]:
    # The same letters have other code points in folders that a Mac wrote, which sort otherwise.
    return {unicodedata.normalize('NFC', name): number for number, name in enumerate(names)}


def check_labels(classifier: Classifier, images: ImageFolder) -> None:
    """Raises a ValueError if images have no labels that a drop in accuracy can be measured with."""
    try:
        check_classes(classifier, images)
    except ValueError:
        raise ValueError(
            f"A largest drop in accuracy needs labels: the folders of '{images.folder}' are not the classes of the "
            f'model. Name its training images, or --exclude layers by the ranking of --sensitivity.'
        ) from None


def random_images(config: Mapping[str, Any], batch_size: int) -> Tensor:
    """Makes a batch like preprocessed images, float32 of shape (N, C, H, W); a run's time does not depend on values."""
    return torch.randn(batch_size, *config['input_size'], generator=torch.Generator().manual_seed(0))


def time_runs(run: Callable[[], Any], seconds: float = 1.0, least: int = 20) -> list[float]:
    """Times a function after warming up, at least `least` times and for some seconds; returns each run's seconds."""
    for _ in range(3):
        run()
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        times.append(time_call(run))
    return times


def is_steady(times: Sequence[float]) -> bool:
    """Returns whether times of single runs are worth comparing: their 90th percentile is close to their median."""
    return quantiles(times, n=10, method='inclusive')[-1] <= _STEADY * median(times)


def alternate(
    runs: Mapping[str, Callable[[], Any]], rounds: int = 15, seconds: float = 0.1
) -> dict[str, list[list[float]]]:
    """Times functions against each other, see `take_turns`.

    Args:
        runs: Name to function.
        rounds: Number of turns of each function.
        seconds: Approximate length of a turn.

    Returns:
        Name to the seconds of each run, for each round.
    """

    def make_turn(run: Callable[[], Any]) -> Callable[[], list[float]]:
        count = max(3, int(seconds / min(time_call(run) for _ in range(3))))

        def turn() -> list[float]:
            # The previous one's threads go on spinning for a while, and its weights fill the caches.
            run()
            run()
            return [time_call(run) for _ in range(count)]

        return turn

    return take_turns({name: make_turn(run) for name, run in runs.items()}, rounds)


def _run(classifier: Classifier, batch_size: int) -> Callable[[], Any]:
    images = random_images(classifier.config, batch_size)
    return lambda: classifier.run(images)
