"""What a model takes images for."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import ImageNetInfo

from ..datasets import open_files
from .classifier import load_classifier
from .evaluation import check_logits

__all__ = ['predict']

_BATCH_SIZE = 32
_SYNSET = re.compile(r'n\d{8}')


def predict(
    source: str | os.PathLike,
    images: Sequence[str | os.PathLike],
    top: int = 5,
    threads: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Classifies images on the CPU.

    Args:
        source: An `.onnx` file, or what `load_model` takes.
        images: Files, and folders, of which all images are taken.
        top: Number of classes to return of each image.
        threads: Number of threads of the model, no more than there are cores. Defaults to all cores.
        overrides: Preprocessing that differs from the model's own, by timm's names.

    Returns:
        A row for each image: `image`, its file, and `classes`, its most probable ones, the best first, each with
        `class` (its index), `name` (None if unknown) and `probability`.

    Raises:
        FileNotFoundError: If an image or the model does not exist.
        ValueError: If a folder has no images, an image does not decode, or the model cannot be loaded.
    """
    classifier = load_classifier(source, threads, overrides)
    names = _in_words(classifier.class_names)
    found = open_files(images, classifier.config)
    rows: list[dict[str, Any]] = []
    for batch, _ in found.batches(range(len(found)), _BATCH_SIZE, 'predict'):
        probabilities, order = check_logits(classifier.run(batch)).float().softmax(1).sort(descending=True, stable=True)
        for classes, values in zip(order[:, :top].tolist(), probabilities[:, :top].tolist()):
            best = [
                {'class': index, 'name': names[index] if names else None, 'probability': value}
                for index, value in zip(classes, values)
            ]
            rows.append({'image': found.files[len(rows)], 'classes': best})
    return rows


def _in_words(names: Sequence[str]) -> list[str]:
    """Replaces WordNet's numbers, which ImageNet calls its classes by, by words."""
    if not any(map(_SYNSET.fullmatch, names)):
        return list(names)
    words = ImageNetInfo()
    return [words.label_name_to_description(name) if _SYNSET.fullmatch(name) else name for name in names]
