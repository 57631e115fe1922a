"""Parts of the training images, images of all classes alike, and decoded images in memory."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..datasets import Images, class_numbers

__all__ = ['SelectedImages', 'class_sizes', 'select_images']

# The same images for each --seed: only then are runs of several seeds, and of several models, of one task.
_SEED = 0


class SelectedImages(Dataset):
    """Some images of a dataset, decoded once if they are kept.

    Args:
        dataset: Dataset of images and labels, without a transform.
        indices: The images.
        keep: Keep decoded images in memory.
        balanced: Draw them anew for each epoch, with replacement, so that all classes come equally often.

    Attributes:
        transform: What is applied to an image; timm's loaders set it.
        class_to_idx: Numbers of the classes by name.
        labels: Numbers of the classes of the images, as they are without drawing; None if the dataset has no list.
    """

    def __init__(self, dataset: Any, indices: Sequence[int], keep: bool, balanced: bool = False):
        self.dataset = dataset
        self.indices = indices
        self.transform: Any = None
        self.class_to_idx = class_numbers(dataset)
        found = _labels(dataset)
        self.labels = None if found is None else [found[index] for index in indices]
        # As bytes: an image of Pillow takes a third more.
        self._kept: dict[int, tuple[str, tuple[int, int], bytes, int]] | None = {} if keep else None
        self._order: list[int] | None = None
        self._weights: Tensor | None = None
        if balanced:
            if self.labels is None:
                raise ValueError('--sampler needs data that list their labels, such as a folder of images.')
            labels = torch.tensor(self.labels)
            self._weights = 1 / labels.bincount()[labels].double()

    def set_epoch(self, epoch: int) -> None:
        """Draws the images of an epoch; its random numbers are those of the epoch."""
        if self._weights is not None:
            # The same on all ranks, whose samplers share the images out.
            generator = torch.Generator().manual_seed(epoch)
            self._order = torch.multinomial(self._weights, len(self), replacement=True, generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        index = self.indices[index if self._order is None else self._order[index]]
        if self._kept is not None and index in self._kept:
            mode, size, content, label = self._kept[index]
            image = Image.frombytes(mode, size, content)
        else:
            image, label = self.dataset[index]
            if self._kept is not None:
                self._kept[index] = image.mode, image.size, image.tobytes(), label
        return (image if self.transform is None else self.transform(image)), label


def select_images(train: Any, validation: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    """Applies `--train-images`, `--holdout`, `--sampler` and `--cache-images`.

    Args:
        train: Training set.
        validation: Validation set; with `--holdout` the training set once more, to validate on a part of it.
        args: Arguments of the run.

    Returns:
        Training and validation set.

    Raises:
        ValueError: If the images are streamed, or there are fewer than asked for.
    """
    if not (args.train_images or args.holdout or args.cache_images or args.sampler):
        return train, validation
    if isinstance(train, IterableDataset):
        raise ValueError(
            '--train-images, --holdout, --sampler and --cache-images need images that are not streamed. Remove them.'
        )
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
    chosen = sorted(order[: args.train_images or left])
    if held_out:
        validation = SelectedImages(validation, sorted(order[left:]), args.cache_images)
    elif args.cache_images:
        validation = SelectedImages(validation, range(len(validation)), True)
    return SelectedImages(train, chosen, args.cache_images, args.sampler == 'balanced'), validation


def class_sizes(dataset: Any, num_classes: int) -> Tensor | None:
    """Returns the number of images of each class; None if the dataset does not list its labels."""
    labels = _labels(dataset)
    return None if labels is None else torch.tensor(labels).bincount(minlength=num_classes).float()


def _labels(dataset: Any) -> list[int] | None:
    """Returns the labels of folders and archives, of timm's data sets, and of torchvision's."""
    labels = getattr(dataset, 'labels' if isinstance(dataset, SelectedImages | Images) else 'targets', None)
    samples = getattr(getattr(dataset, 'reader', None), 'samples', None)
    if labels is None and isinstance(samples, Sequence):
        labels = [sample[1] for sample in samples]
    return None if labels is None else [int(label) for label in labels]
