"""Image folders through timm's factory, and the classes of its datasets."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.data import create_dataset

__all__ = ['check_same_classes', 'class_names', 'count_classes', 'open_folder']

# The names of splits that timm knows, and one that many folders have.
_SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test')


def open_folder(root: str | os.PathLike, split: str, need_split: bool, **kwargs: Any) -> Any:
    """Opens a folder, or a tar file, of images in folders, one for each class.

    Args:
        root: The folder, or one with a folder for each split.
        split: Split to look for, such as `train` or `validation`.
        need_split: Refuse a folder without splits: two splits of it would be the same images.
        **kwargs: Further arguments of `timm.data.create_dataset`, such as `class_map`.

    Returns:
        timm's dataset.

    Raises:
        FileNotFoundError: If there is no such folder or class map.
        ValueError: If there are no images in it, it does not have the split, or the class map cannot be read.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"There is no image folder '{root}'.")
    _check_class_map(kwargs.get('class_map') or '', root)
    try:
        dataset = create_dataset('', root=os.fspath(root), split=split, **kwargs)
    except RuntimeError as error:
        raise ValueError(f"There are no images for the split '{split}' in '{root}': {error}") from None
    splits = sorted(name for name in _SPLITS if (root / name).is_dir())
    if root.is_dir() and Path(getattr(dataset.reader, 'root', root)) == root and (need_split or splits):
        raise ValueError(
            f"'{root}' has no split '{split}', but {', '.join(splits) or 'classes only'}. Make a folder "
            f"'{root / split}' with a folder for each class, or name another split."
        )
    return dataset


def _check_class_map(class_map: str, root: Path) -> None:
    # timm looks for it in the folder of images too, and takes these two formats.
    if class_map and not (Path(class_map).is_file() or Path(root, class_map).is_file()):
        raise FileNotFoundError(f"There is no class map '{class_map}'.")
    if class_map and Path(class_map).suffix.lower() not in ('.txt', '.pkl'):
        raise ValueError(f"The class map '{class_map}' is no .txt file, a name per line, and no .pkl of a dict.")


def _class_numbers(dataset: Any) -> dict[str, int]:
    """Returns the numbers of a dataset's classes by name; none if it does not tell them."""
    for owner in (dataset, getattr(dataset, 'reader', None)):
        for attribute in ('class_to_idx', 'class_name_to_idx', 'classes'):
            classes = getattr(owner, attribute, None)
            if isinstance(classes, Mapping) and classes:
                return {str(name): int(number) for name, number in classes.items()}
            if classes:
                return {str(name): number for number, name in enumerate(classes)}
    return {}


def count_classes(dataset: Any) -> int | None:
    """Counts a dataset's classes, if it tells them."""
    # Several names may share a number.
    return max(_class_numbers(dataset).values(), default=-1) + 1 or None


def class_names(dataset: Any) -> list[str]:
    """Returns the names of a dataset's classes in the order of their numbers; none without one name for each."""
    numbers = _class_numbers(dataset)
    names = sorted(numbers, key=lambda name: numbers[name])
    return names if [numbers[name] for name in names] == list(range(len(names))) else []


def check_same_classes(train: Any, validation: Any) -> None:
    """Raises a ValueError if both datasets tell their classes, and validation numbers one differently."""
    numbers = _class_numbers(train)
    for name, number in _class_numbers(validation).items() if numbers else ():
        if numbers.get(name) != number:
            raise ValueError(
                f"The class '{name}' has the number {number} in the validation images, but {numbers.get(name, 'none')} "
                f'in those for training. Give both the same folders, or the same numbers by --class-map.'
            )
