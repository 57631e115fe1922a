"""What a model takes images for, and the `repopt-timm predict` command."""

import argparse
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from ..reporting import add_command, positive, print_result
from .classifier import Classifier, is_onnx, load_classifier, torch_classifier
from .evaluation import check_logits
from .image_folder import image_reader
from .trained_model import load_model

__all__ = ['add_commands', 'predict']

_BATCH_SIZE = 32
_IMAGENET_TAG = re.compile(r'(^|_)in(1k|12k|21k|22k)(_|$)')
_SYNSET = re.compile(r'n\d{8}')


def predict(
    source: str | os.PathLike,
    images: Sequence[str | os.PathLike],
    top: int = 5,
    threads: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[list[dict[str, Any]]]:
    """Classifies images on the CPU.

    Args:
        source: An `.onnx` file, or what `load_model` takes.
        images: Files.
        top: Number of classes to return of each image.
        threads: Number of threads of the model. Defaults to all cores.
        overrides: Preprocessing that differs from the model's own, by timm's names.

    Returns:
        For each image its most probable classes, the best first, each with `class` (its index), `name` (None if
        unknown) and `probability`.

    Raises:
        FileNotFoundError: If an image or the model does not exist.
        ValueError: If an image is a folder or does not decode, or the model cannot be loaded.
    """
    for image in images:
        if Path(image).is_dir():
            raise ValueError(f"'{image}' is a folder, expected image files, such as '{image}/*.jpg'.")
        if not Path(image).is_file():
            raise FileNotFoundError(f"There is no image '{image}', expected a file such as photo.jpg. Check the path.")
    classifier, names = _load(source, threads, overrides)
    read = image_reader(classifier.config)
    results: list[list[dict[str, Any]]] = []
    for start in range(0, len(images), _BATCH_SIZE):
        files = images[start : start + _BATCH_SIZE]
        batch = torch.stack([read(file, os.fspath(file)) for file in files])
        probabilities, classes = check_logits(classifier.run(batch)).float().softmax(1).sort(1, descending=True)
        results += [
            [
                {'class': index, 'name': names[index] if names else None, 'probability': probability}
                for index, probability in zip(*(values.tolist()[:top] for values in row))
            ]
            for row in zip(classes, probabilities)
        ]
    return results


def _load(
    source: str | os.PathLike, threads: int | None, overrides: Mapping[str, Any] | None
) -> tuple[Classifier, Sequence[str]]:
    if is_onnx(source):
        classifier = load_classifier(source, threads, overrides)
        return classifier, _described(classifier.class_names)
    model = load_model(source)
    classifier = torch_classifier(model, threads, overrides)
    return classifier, _described(classifier.class_names) or _imagenet_names(model)


def _described(names: Iterable[str]) -> list[str]:
    """Replaces WordNet's numbers, which ImageNet calls its classes by, by words."""
    names = list(names)
    if not any(_SYNSET.fullmatch(name) for name in names):
        return names
    words = ImageNetInfo()
    return [words.label_name_to_description(name) if _SYNSET.fullmatch(name) else name for name in names]


def _imagenet_names(model: nn.Module) -> Sequence[str]:
    # timm's own weights state their data in their tag alone.
    config: Any = getattr(model, 'pretrained_cfg', None) or {}
    subset = infer_imagenet_subset(model) if _IMAGENET_TAG.search(config.get('tag') or '') else None
    return ImageNetInfo(subset).label_descriptions() if subset else []  # type: ignore[return-value]


def add_commands(commands: Any) -> None:
    """Adds `predict` to the commands of `repopt-timm`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    parser = add_command(commands, 'predict', _predict)
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='file')
    parser.add_argument(
        '--model',
        required=True,
        help="checkpoint, folder in the format of timm, .onnx file, 'hf-hub:user/repo', or name for timm.create_model",
    )
    parser.add_argument('--top', type=positive(int), default=5, metavar='N', help='classes to show')
    parser.add_argument('--threads', type=positive(int), metavar='N', help='threads of the model [all cores]')


def _predict(args: argparse.Namespace) -> None:
    results = predict(args.model, args.images, args.top, args.threads)
    values = [{'image': image, 'classes': classes} for image, classes in zip(args.images, results)]
    lines = []
    for image, classes in zip(args.images, results):
        lines.append(image)
        for row in classes:
            name = row['name'] or f'class {row["class"]}'
            lines.append(f'{100 * row["probability"]:8.2f} %  {name}')
    print_result(args, {'model': args.model, 'images': values}, '\n'.join(lines))
