"""Image folders, read with timm's evaluation preprocessing."""

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from ..color_modes import evaluated_mode
from ..datasets import class_names, count_classes, open_folder

__all__ = ['ImageFolder', 'image_reader']

_WORKERS = min(8, os.cpu_count() or 1)


def image_reader(config: Mapping[str, Any]) -> Callable[[Any, str], Tensor]:
    """Makes a function that reads an image as a model takes it, float32 of shape (C, H, W).

    Args:
        config: Preprocessing, as `classifier.preprocessing` gives it.

    Returns:
        A function of a path or an open file, and of what to call it in errors. It raises a ValueError if the image does
        not decode.

    Raises:
        ValueError: If images cannot have as many channels, or be of the mode that is stated.
    """
    mode = evaluated_mode(config)
    transform: Any = create_transform(**{name: value for name, value in config.items() if name != 'input_img_mode'})
    return partial(_read, mode, transform)


def _read(mode: str, transform: Callable[[Image.Image], Tensor], file: Any, name: str) -> Tensor:
    try:
        with Image.open(file) as image:
            pixels = image.convert(mode)
    # Pillow's PNG reader raises SyntaxError on broken headers.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).split(' <')[0]
        raise ValueError(f"The image '{name}' cannot be read: {reason}. Remove or replace it.") from None
    return transform(pixels)


class ImageFolder:
    """Images in folders, one folder per class.

    Not timm's loader: that takes the next image in place of one that does not decode, which is right for training
    and wrong for measuring.

    Args:
        root: The folder, or one with a folder for each split, named as timm's training script expects.
        split: Split to look for in `root`, such as `train` or `validation`.
        config: Preprocessing, as `classifier.preprocessing` gives it.
        class_map: File of classes and their numbers, as timm's scripts take it. Defaults to the order of the names.

    Attributes:
        folder: Where the images are.
        num_classes: Number of classes that the folder has.
        class_names: Their names in the order of their numbers; none if a class map gives several one number.

    Raises:
        FileNotFoundError: If there is no such folder or class map.
        ValueError: If there are no images in it, it has other splits, the class map cannot be read, or images cannot
            have the channels or the mode that the model takes.
    """

    def __init__(self, root: str | os.PathLike, split: str, config: Mapping[str, Any], class_map: str = ''):
        dataset = open_folder(root, split, need_split=False, class_map=class_map)
        self.folder = Path(dataset.reader.root)
        self.num_classes = count_classes(dataset)
        self.class_names = class_names(dataset)
        self._reader = dataset.reader
        self._read = image_reader(config)

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns a preprocessed image, float32 of shape (C, H, W), and its class.

        Raises:
            ValueError: If it does not decode.
        """
        file, target = self._reader[index]
        with file:
            return self._read(file, self._reader.filename(index, absolute=True)), target

    def sample(self, count: int, seed: int) -> list[int]:
        """Draws `count` images without repetition; all of them if there are no more."""
        return random.Random(seed).sample(range(len(self)), min(count, len(self)))

    def batches(
        self, indices: Sequence[int], batch_size: int, title: str, whole: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images, float32 of shape (N, C, H, W), and classes, int64 of shape (N,), under a progress bar.

        Args:
            indices: Which images, in this order.
            batch_size: Images in a batch; the last one may have fewer.
            title: What the bar says.
            whole: Fill the last batch, with the first images again.

        Raises:
            ValueError: If an image does not decode.
        """
        if whole:
            indices = [*indices, *islice(cycle(indices), -len(indices) % batch_size)]
        chunks = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
        # `disable=None` shows the bar on terminals only.
        with (
            ThreadPoolExecutor(_WORKERS) as pool,
            tqdm(total=len(indices), desc=title, unit='img', disable=None) as bar,
        ):
            # Two chunks are in memory: `map` starts at once, so that the next one decodes while this one is used.
            following = pool.map(self.__getitem__, chunks[0] if chunks else [])
            for number, chunk in enumerate(chunks, start=1):
                current, following = following, pool.map(self.__getitem__, chunks[number] if chunks[number:] else [])
                images, targets = zip(*current)
                yield torch.stack(images), torch.tensor(targets)
                bar.update(len(chunk))
