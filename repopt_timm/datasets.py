"""Image folders through timm's factory, and the classes of its datasets."""

import logging
import os
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset, create_dataset, resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key

__all__ = [
    'check_same_classes',
    'check_two_splits',
    'class_names',
    'class_numbers',
    'count_classes',
    'data_config_of',
    'open_folder',
    'read_class_map',
]

_logger = logging.getLogger(__name__)

# As many as timm tries.
_ATTEMPTS = 10

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
        timm's dataset, without images in hidden folders.

    Raises:
        FileNotFoundError: If the folder or class map does not exist.
        ValueError: If there are no images in it, it does not have the split, or the class map cannot be read.
    """
    root = Path(root)
    if not root.exists():
        where = '' if root.is_absolute() else f" in '{Path.cwd()}'"
        raise FileNotFoundError(
            f"There is no image folder '{root}'{where}, expected one with images in {split}/<class>/. Check the path."
        )
    for place in (root, root / split):
        if not place.is_dir():
            _check_regular(place)
    if root.is_dir():
        _check_tree(root)
    class_map: Any = read_class_map(kwargs.pop('class_map', None), root)
    try:
        dataset = create_dataset('', root=os.fspath(root), split=split, class_map=class_map, **kwargs)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"There are no images for the split '{split}' in '{root}': {error}") from None
    except (tarfile.TarError, EOFError) as error:
        archive = root / split if root.is_dir() else root
        raise ValueError(f"'{archive}' is not a readable .tar file: {error}.") from None
    splits = sorted(name for name in _SPLITS if (root / name).is_dir())
    if root.is_dir() and Path(getattr(dataset.reader, 'root', root)) == root and (need_split or splits):
        raise ValueError(
            f"'{root}' has no split '{split}', but {', '.join(splits) or 'classes only'}. Make a folder "
            f"'{root / split}' with a folder for each class, or name another split."
        )
    if isinstance(dataset.reader, ReaderImageFolder):
        _skip_hidden(dataset.reader, class_map)
    elif isinstance(dataset.reader, ReaderImageInTar):
        # Of one open file, forked workers and threads share the position, and read from where another one is.
        dataset.reader.cache_tarfiles = False
    named = _NamedImages(None, reader=dataset.reader, input_img_mode=dataset.input_img_mode)
    named.skip_damaged = kwargs.get('is_training', False)
    return named


def check_two_splits(root: str | os.PathLike, otherwise: str = '') -> None:
    """Checks that training and validation images can differ, which those of one file cannot.

    Args:
        root: The folder, or .tar file.
        otherwise: What else the error advises.

    Raises:
        ValueError: If it is a file.
    """
    if Path(root).is_file():
        raise ValueError(
            f"'{root}' is one file, expected one for each split: the validation would be on training images. Name the "
            f'folder of both, with --train-split train.tar --val-split validation.tar{otherwise}.'
        )


class _NamedImages(ImageDataset):
    """timm's dataset, which names an image that cannot be read instead of its index.

    Attributes:
        skip_damaged: Go on with the next image, as timm does. A validation would be of other images.
    """

    skip_damaged = False

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for offset in range(min(_ATTEMPTS, len(self))):
            position = (index + offset) % len(self)
            try:
                file, target = self.reader[position]
                with file:
                    image = Image.open(file).convert(self.input_img_mode)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                name = self.filename(position, absolute=True)
                if not self.skip_damaged:
                    raise ValueError(f"The image '{name}' is damaged: {error}. Remove or replace it.") from None
                _logger.warning(f"The image '{name}' is damaged and skipped: {error}")
                continue
            return (image if self.transform is None else self.transform(image)), target
        raise ValueError(
            f"The image '{name}' and the {offset} before it are damaged: check the data, such as for a copy that was "
            f'broken off.'
        )


def _check_tree(root: Path) -> None:
    """Raises a ValueError if a folder of images leads back into itself, or has pipes or devices named as images."""
    # timm follows links, and would find the images of a loop forty times over; opening a pipe waits forever.
    suffixes = get_img_extensions(as_set=True)
    done: set[str] = set()

    def visit(folder: str, inside: frozenset[str]) -> None:
        try:
            entries = list(os.scandir(folder))
        except PermissionError:
            # Such as lost+found, which timm passes over.
            entries = []
        for entry in entries:
            if entry.is_dir():
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(folder, entry.name)
                if real in inside:
                    raise ValueError(f"'{entry.path}' is a link to a folder that it is in: remove it.")
                if real not in done:
                    visit(real, inside | {real})
            elif os.path.splitext(entry.name)[1].lower() in suffixes and not entry.is_file():
                _check_regular(entry.path)
        done.add(folder)

    real_root = os.path.realpath(root)
    visit(real_root, frozenset({real_root}))


def _check_regular(path: str | os.PathLike) -> None:
    # A link to nowhere is like a damaged image.
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"'{path}' is a pipe or a device, expected an image or a .tar file of images: remove it.")


def _skip_hidden(reader: ReaderImageFolder, class_map: Mapping[str, int] | None) -> None:
    """Removes the images in hidden folders, such as `.ipynb_checkpoints`, which timm takes for a class."""
    shown = [sample for sample in reader.samples if not _is_hidden(os.path.relpath(sample[0], reader.root))]
    if len(shown) == len(reader.samples):
        return
    if not shown:
        raise ValueError(f"'{reader.root}' has images in hidden folders only.")
    if class_map is None:
        names = {number: name for name, number in reader.class_to_idx.items()}
        found = sorted({names[number] for _, number in shown}, key=natural_key)
        reader.class_to_idx = {name: number for number, name in enumerate(found)}
        shown = [(path, reader.class_to_idx[names[number]]) for path, number in shown]
    reader.samples = shown


def _is_hidden(path: str) -> bool:
    return any(part.startswith('.') for part in Path(path).parts)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f'it would run {module_name}.{global_name}')


def read_class_map(class_map: str | None, root: str | os.PathLike | None) -> dict[str, int] | None:
    """Reads a class map: a .txt file with a name on each line, or a .pkl file of a dict from names to numbers.

    Args:
        class_map: The file; timm also looks for it in the folder of images.
        root: That folder.

    Returns:
        The numbers of classes by name; None without a file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is neither, or would run code.
    """
    if not class_map:
        return None
    paths = [path for path in (Path(class_map), Path(root or '.', class_map)) if path.is_file()]
    if not paths:
        raise FileNotFoundError(f"There is no class map '{class_map}'.")
    suffix = paths[0].suffix.lower()
    if suffix not in ('.txt', '.pkl'):
        raise ValueError(f"The class map '{class_map}' is not a .txt file, a name per line, nor a .pkl file of a dict.")
    try:
        if suffix == '.txt':
            # Like timm, which numbers the lines.
            return {line.strip(): number for number, line in enumerate(paths[0].read_text('utf-8').splitlines())}
        with open(paths[0], 'rb') as file:
            numbers = _PlainUnpickler(file).load()
    except (UnicodeDecodeError, pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"The class map '{class_map}' cannot be read: {error}.") from None
    except (AttributeError, ImportError, MemoryError, OverflowError) as error:
        raise ValueError(f"The class map '{class_map}' cannot be read: {error}.") from None
    if not isinstance(numbers, dict) or not all(type(n) is int and n >= 0 for n in numbers.values()):
        raise ValueError(
            f"The class map '{class_map}' does not hold a dict from names to numbers, such as {{'cat': 0, 'dog': 1}}. "
            f'Write it anew, or as a .txt file, a name per line.'
        )
    return numbers


def class_numbers(dataset: Any) -> dict[str, int]:
    """Returns the numbers of a dataset's classes by name; none if it does not name them."""
    for owner in (dataset, getattr(dataset, 'reader', None)):
        for attribute in ('class_to_idx', 'class_name_to_idx', 'classes'):
            classes = getattr(owner, attribute, None)
            if isinstance(classes, Mapping) and classes:
                return {str(name): int(number) for name, number in classes.items()}
            if classes:
                return {str(name): number for number, name in enumerate(classes)}
    return {}


def count_classes(dataset: Any) -> int | None:
    """Counts a dataset's classes, if it names them."""
    # Several names may share a number.
    return max(class_numbers(dataset).values(), default=-1) + 1 or None


def class_names(dataset: Any) -> list[str]:
    """Returns the names of a dataset's classes in the order of their numbers; none without one name for each."""
    numbers = class_numbers(dataset)
    names = sorted(numbers, key=lambda name: numbers[name])
    return names if [numbers[name] for name in names] == list(range(len(names))) else []


def check_same_classes(train: Any, validation: Any) -> None:
    """Raises a ValueError if both datasets name their classes, and they differ in names or numbers."""
    numbers, found = class_numbers(train), class_numbers(validation)
    if not numbers or not found:
        return
    advice = 'Give both the same folders, or the same numbers by --class-map.'
    for split, missing in (('training', set(found) - set(numbers)), ('validation', set(numbers) - set(found))):
        if missing:
            names = ', '.join(f"'{name}'" for name in sorted(missing, key=natural_key)[:5])
            more = f' and {len(missing) - 5} more' if len(missing) > 5 else ''
            raise ValueError(f'The {split} images lack the class {names}{more}. {advice}')
    for name, number in found.items():
        if numbers[name] != number:
            raise ValueError(
                f"The class '{name}' has the number {number} in the validation images, but {numbers[name]} in those "
                f'for training. {advice}'
            )


def data_config_of(args: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Returns what `timm.data.resolve_data_config` does, with a mean and a standard deviation for each channel.

    Those of a model for three channels are averaged for another number of them, as timm's loader does.

    Args:
        args: Arguments of a run; they come before what the model says.
        model: The model.
    """
    channels = (args.get('input_size') or [args.get('in_chans') or 3])[0]
    given = {name: args[name] for name in ('mean', 'std') if args.get(name) and len(args[name]) > 1}
    config = resolve_data_config({**args, **_averaged(given, channels)}, model=model)
    return {**config, **_averaged({name: config[name] for name in ('mean', 'std')}, channels)}


def _averaged(values: Mapping[str, Any], channels: int) -> dict[str, Any]:
    return {name: value if len(value) == channels else adapt_to_chs(value, channels) for name, value in values.items()}
