"""Measures a model's accuracy, in all and per class, latency, throughput and size; classifies images."""

import csv
import os
import timeit
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeVar

import numpy as np
import torch
from timm.data import ImageNetInfo
from torch import Tensor

from ..datasets import Images, class_names, count_classes, open_evaluation, open_files
from ..files import replacing
from ..plot import save_figure, subplots
from ..reporting import markdown_table
from .classifier import Classifier, load_classifier
from .runtime import require

_T = TypeVar('_T')


@dataclass(frozen=True)
class Predictions:
    """What a model says of labelled images: the five best classes of each, of shape (N, 5), the first being `argmax`,
    and the number of images whose two largest logits are equal.
    """

    labels: Tensor
    ranked: Tensor
    ties: int

    def accuracy(self, top: int = 1) -> float:
        """Returns the percentage of images whose class is among the first `top`."""
        return 100 * (self.ranked[:, :top] == self.labels[:, None]).any(1).double().mean().item()


def evaluate(
    source: str | os.PathLike,
    data: str | os.PathLike,
    split: str = 'validation',
    batch_size: int = 32,
    threads: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    class_map: str = '',
    out: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Evaluates a model on an image folder, on the CPU.

    Args:
        source: An `.onnx` file, or what `load_model` takes.
        data: Image folder, see `open_split`.
        split: Its split.
        batch_size: Images in a batch, for accuracy and throughput.
        threads: Number of threads of the model. Defaults to all cores.
        overrides: Preprocessing that differs from the model's own, by timm's names.
        class_map: File of the classes, for a model that does not name its own; see `open_split`.
        out: Folder to write `classes.csv`, `confusion.csv` and `confusion.png` to.

    Returns:
        `model`, `backend`, `images`, `top1` and `top5` in percent (`top5` over as many classes as there are if fewer),
        `ties`, the number of images whose two largest logits are equal, `classes`, a row for each, `latency_ms` and
        `latency_p90_ms` of a batch of `latency_batch` images, which is one where the model takes one, `throughput` in
        images per second, at `batch_size`, and `bytes` on disk. The times exclude decoding.

    Raises:
        FileNotFoundError: If there is no such model or folder.
        ImportError: If `out` is given, and matplotlib or scikit-learn is not installed.
        ValueError: If an image does not decode, or model and folder have different classes.
    """
    classifier = load_classifier(source, threads, overrides)
    images = open_evaluation(data, split, classifier.config, class_map, classifier.class_names)
    found = classify({'evaluation': classifier}, images, batch_size)['evaluation']
    names = class_names(images) or list(map(str, range(count_classes(images) or 0)))
    if out is not None:
        write_confusion(found.labels, found.ranked[:, 0], names, out)
    batches = [classifier.images_for(count) for count in (1, batch_size)]
    single, many = (time_runs(partial(classifier.run, random_images(classifier.config, count))) for count in batches)
    return {
        'model': os.fspath(source),
        'backend': classifier.backend,
        'images': len(images),
        'top1': found.accuracy(1),
        'top5': found.accuracy(5),
        'ties': found.ties,
        'latency_batch': batches[0],
        'latency_ms': 1000 * median(single),
        'latency_p90_ms': 1000 * quantiles(single, n=10)[-1],
        'throughput': batches[1] / median(many),
        'batch_size': batches[1],
        'bytes': classifier.size,
        'classes': class_table(found.labels, found.ranked[:, 0], names),
    }


def predict(
    source: str | os.PathLike,
    images: Sequence[str | os.PathLike],
    top: int = 5,
    overrides: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Classifies images on the CPU.

    Args:
        source: See `evaluate`.
        images: Files, and folders, of which all images are taken.
        top: Number of classes to return of each image.
        overrides: See `evaluate`.

    Returns:
        A row for each image: `image`, its file, and `classes`, its most probable ones, the best first, each with
        `class` (its index), `name` (None if unknown) and `probability`.

    Raises:
        FileNotFoundError: If an image or the model does not exist.
        ValueError: If a folder has no images, an image does not decode, or the model cannot be loaded.
    """
    classifier = load_classifier(source, overrides=overrides)
    names, words = list(classifier.class_names), ImageNetInfo()
    for index, name in enumerate(names):
        # ImageNet calls its classes by WordNet's numbers.
        with suppress(KeyError):
            names[index] = words.label_name_to_description(name)
    found = open_files(images, classifier.config)
    rows: list[dict[str, Any]] = []
    for batch, _ in found.batches(range(len(found)), 32, 'predict'):
        logits, order = classifier.ranked(batch)
        for classes, values in zip(order[:, :top].tolist(), logits.softmax(1).tolist()):
            best = [
                {'class': number, 'name': names[number] if names else None, 'probability': value}
                for number, value in zip(classes, values)
            ]
            rows.append({'image': found.files[len(rows)], 'classes': best})
    return rows


def classify(
    classifiers: Mapping[_T, Classifier], images: Images, batch_size: int = 32, title: str = 'evaluation'
) -> dict[_T, Predictions]:
    """Runs models with the same preprocessing and the classes of the folder in one pass over labelled images."""
    for classifier in classifiers.values():
        check_classes(classifier, images)
    ranked: dict[_T, list[Tensor]] = {name: [] for name in classifiers}
    ties = dict.fromkeys(classifiers, 0)
    for batch, _ in images.batches(range(len(images)), batch_size, title):
        for name, classifier in classifiers.items():
            logits, order = classifier.ranked(batch)
            ranked[name].append(order[:, :5].clone())
            ties[name] += int((logits[:, :1] == logits[:, 1:2]).sum())
    labels = torch.tensor(images.labels)
    return {name: Predictions(labels, torch.cat(rows), ties[name]) for name, rows in ranked.items()}


def class_table(labels: Tensor, predictions: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row for each class: `class`, `images`, `accuracy` in percent (None without images), `confused_with`,
    the class that misclassified images are most often taken for, and `confused`, how many of them ('' and 0 if none).
    """
    rows = []
    # The matrix lacks images that are taken for a class that the folder does not have.
    totals = torch.bincount(labels, minlength=len(classes)).tolist()
    for number, counts in enumerate(_confusion(labels, predictions, len(classes))):
        images, right = totals[number], int(counts[number])
        counts[number] = 0
        worst = int(counts.argmax())
        row = {'class': classes[number], 'images': images, 'accuracy': 100 * right / images if images else None}
        rows.append({**row, 'confused_with': classes[worst] if counts[worst] else '', 'confused': int(counts[worst])})
    return rows


def worst_classes(rows: Iterable[Mapping[str, Any]], most: int) -> str:
    """Formats rows of `class_table` as Markdown, at most so many: the lowest accuracy first, no images last."""
    rows = sorted(rows, key=lambda row: row['accuracy'] if row['images'] else 101)
    cells = [
        [
            row['class'],
            str(row['images']),
            f'{row["accuracy"]:.2f}' if row['images'] else '',
            f'{row["confused_with"]} ({row["confused"]})' if row['confused'] else '',
        ]
        for row in rows[:most]
    ]
    return markdown_table(['class', 'images', 'top-1 %', 'most often taken for (images)'], cells, align=True)


def write_confusion(labels: Tensor, predictions: Tensor, classes: Sequence[str], folder: str | os.PathLike) -> None:
    """Writes `classes.csv`, see `class_table`, and the confusion matrix: counts in `confusion.csv`, shares in
    `confusion.png`. Needs matplotlib and scikit-learn.
    """
    legible = len(classes) <= 40
    side = 3 + 0.4 * len(classes) if legible else 7
    figure, axes = subplots(1, 1, (side + 1, side), 'constrained')
    counts = _confusion(labels, predictions, len(classes))
    # Images that are taken for a class outside of the folder count, too.
    shares = counts / torch.bincount(labels, minlength=len(classes)).numpy()[:, None].clip(1)
    names = [f'{name:.30}' for name in classes]
    require('sklearn.metrics').ConfusionMatrixDisplay(shares, display_labels=names).plot(
        include_values=legible, values_format='.0%', xticks_rotation='vertical', cmap='Blues', ax=axes
    )
    axes.set(xlabel='predicted class', ylabel='class of the image', title='Share of the images of a class')
    if not legible:
        axes.set(xticks=[], yticks=[])
    save_figure(figure, Path(folder, 'confusion.png'))
    table = class_table(labels, predictions, classes)
    write_csv(Path(folder, 'classes.csv'), table[0], map(dict.values, table))
    write_csv(Path(folder, 'confusion.csv'), ['', *classes], ([name, *row] for name, row in zip(classes, counts)))


def _confusion(labels: Tensor, predictions: Tensor, count: int) -> np.ndarray:
    """Counts images by class and predicted class; a model may have more classes than the folder."""
    known = predictions < count
    return torch.bincount(count * labels[known] + predictions[known], minlength=count**2).view(count, count).numpy()


def write_csv(path: str | os.PathLike, head: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Writes a table, whole or not at all."""
    # Names of files may have bytes that are not UTF-8.
    with (
        replacing(path) as temporary,
        temporary.open('w', encoding='utf-8', errors='surrogateescape', newline='') as file,
    ):
        csv.writer(file).writerows([head, *rows])


def check_classes(classifier: Classifier, images: Images) -> None:
    """Raises a ValueError if the number or the order of a model's classes is not that of the folder."""
    classes = classifier.run(random_images(classifier.config, 1)).shape[-1]
    if classes != count_classes(images):
        raise ValueError(
            f"The model has {classes} classes, but the folder '{images.folder}' has {count_classes(images)}. Name the "
            f'folder of the data set that it was trained on.'
        )
    for number, name in enumerate(classifier.class_names):
        # A name that only one of them has, as WordNet's beside words, says nothing about the order.
        if images.class_to_idx.get(name, number) != number:
            raise ValueError(
                f"Class {number} of the model is '{name}', but in the folder '{images.folder}' '{name}' is class "
                f'{images.class_to_idx[name]}. Give the --class-map that the model was trained with.'
            )


def random_images(config: Mapping[str, Any], batch_size: int) -> Tensor:
    """Makes a batch like preprocessed images, float32 of shape (N, C, H, W); a run's time does not depend on values."""
    return torch.randn(batch_size, *config['input_size'], generator=torch.Generator().manual_seed(0))


def time_runs(run: Callable[[], Any], seconds: float = 1.0) -> list[float]:
    """Returns the seconds of single runs: three to warm up, then at least 20 runs and at least `seconds`."""
    for _ in range(3):
        run()
    times: list[float] = []
    while len(times) < 20 or sum(times) < seconds:
        times.append(timeit.timeit(run, number=1))
    return times
