"""Parts of the training images, and decoded images in memory."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from ..datasets import class_numbers

__all__ = ['SelectedImages', 'select_images']

# The same images for each --seed: only then are runs of several seeds, and of several models, of one task.
_SEED = 0


class SelectedImages(Dataset):
    """Some images of a dataset, decoded once if they are kept.

    Args:
        dataset: Dataset of images and labels, without a transform.
        indices: The images.
        keep: Keep decoded images in memory.

    Attributes:
        transform: What is applied to an image; timm's loaders set it.
        class_to_idx: Numbers of the classes by name.
    """

    def __init__(self, dataset: Any, indices: Sequence[int], keep: bool):
        self.dataset = dataset
        self.indices = indices
        self.transform: Any = None
        self.class_to_idx = class_numbers(dataset)
        # As bytes: an image of Pillow takes a third more.
        self._kept: list[tuple[str, tuple[int, int], bytes, int] | None] | None = (
            [None] * len(indices) if keep else None
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self._read(index)
        return (image if self.transform is None else self.transform(image)), label

    def _read(self, index: int) -> tuple[Any, int]:
        if self._kept is None:
            return self.dataset[self.indices[index]]
        kept = self._kept[index]
        if kept is None:
            image, label = self.dataset[self.indices[index]]
            self._kept[index] = image.mode, image.size, image.tobytes(), label
            return image, label
        mode, size, content, label = kept
        return Image.frombytes(mode, size, content), label


def select_images(train: Any, validation: Any, held_out_from: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    """Applies `--train-images`, `--holdout` and `--cache-images`.

    Args:
        train: Training set.
        validation: Validation set.
        held_out_from: The training set once more, to validate on a part of it.
        args: Arguments of the run.

    Returns:
        Training and validation set.

    Raises:
        ValueError: If the images are streamed, or there are fewer than asked for.
    """
    if not (args.train_images or args.holdout or args.cache_images):
        return train, validation
    if isinstance(train, IterableDataset):
        raise ValueError('--train-images, --holdout and --cache-images need images that are not streamed. Remove them.')
    count = len(train)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_SEED)).tolist()
    held_out = round(args.holdout * count)
    if args.holdout and not 0 < held_out < count:
        raise ValueError(f'--holdout is {args.holdout:g} of {count} training images, which leaves one part empty.')
    left = count - held_out
    if args.train_images and args.train_images > left:
        beside = f' beside the {held_out} of --holdout' if held_out else ''
        raise ValueError(
            f'--train-images is {args.train_images}, but there are {left} training images{beside}: lower it.'
        )
    chosen = order[: args.train_images or left]
    if held_out:
        validation = SelectedImages(held_out_from, sorted(order[left:]), args.cache_images)
    elif args.cache_images:
        validation = SelectedImages(validation, range(len(validation)), True)
    return SelectedImages(train, sorted(chosen), args.cache_images), validation
