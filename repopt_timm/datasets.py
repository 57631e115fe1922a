"""Images in folders of classes: training, evaluation, calibration and prediction read them here."""

import logging
import os
import random
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from huggingface_hub.utils import tqdm
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.data.readers.img_extensions import set_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from .errors import explaining

_logger = logging.getLogger(__name__)

# Channels to Pillow's mode.
_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}

_SPLITS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'), ('test',))

# Pillow opens these, but leaves the pixels to other programs and packages.
_WITHOUT_PIXELS = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF'}


class Images(Dataset):
    """A dataset of image files, or of the images in an archive, with the numbers of their classes.

    The EXIF orientation is applied, and 16 bits are scaled to 8. An image is one of Pillow unless there is a
    `transform`, which timm's loaders set. With `skip_damaged` the next image is taken if one cannot be read, as timm
    does; an evaluation would then be of other images.
    """

    def __init__(
        self,
        files: Sequence[str],
        channels: int,
        labels: Sequence[int] = (),
        class_to_idx: Mapping[str, int] | None = None,
        folder: Path | None = None,
        archive: Any = None,
    ):
        self.files = files
        self.mode = color_mode(channels)
        self.labels = labels or [0] * len(files)
        self.class_to_idx = class_to_idx or {}
        self.folder = folder
        self.archive = archive
        self.transform: Any = None
        self.skip_damaged = False

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        # timm gives up after ten damaged images in a row, too.
        for place in range(index, index + 10):
            place %= len(self)
            name = self.files[place]
            try:
                with (
                    open(name, 'rb') if self.archive is None else self.archive[place][0] as file,
                    Image.open(file) as image,
                ):
                    image.load()
                    # An orientation that cannot be read is none.
                    with suppress(SyntaxError):
                        ImageOps.exif_transpose(image, in_place=True)
                break
            # Pillow's PNG reader raises SyntaxError on broken headers.
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                reason = str(error).split(' <')[0]
                if not self.skip_damaged:
                    raise ValueError(f"The image '{name}' is damaged: {reason}. Remove or replace it.") from None
                _logger.warning(f"The image '{name}' is damaged and skipped: {reason}")
        else:
            count = min(10, len(self))
            raise ValueError(f"{count} images in a row, up to '{name}', are damaged: were the data copied completely?")
        # `convert` would clip values of 16 bits at 255.
        pixels: Image.Image = image
        if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
            pixels = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ('I', 'F'):
            raise ValueError(f"The image '{name}' has values in the mode '{image.mode}': convert it to 8 or 16 bits.")
        pixels = pixels.convert(self.mode)
        return (pixels if self.transform is None else self.transform(pixels)), self.labels[place]

    def sample(self, count: int, seed: int) -> list[int]:
        """Draws the indices of `count` images without repetition; all of them if there are no more."""
        return random.Random(seed).sample(range(len(self)), min(count, len(self)))

    def batches(
        self, indices: Sequence[int], batch_size: int, title: str, whole: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images, float32 of shape (N, C, H, W), and classes, int64 of shape (N,), under a progress bar.

        The last batch may have fewer images; a `whole` one is filled with the first images again.
        """
        if whole:
            indices = [*indices, *islice(cycle(indices), -len(indices) % batch_size)]
        # Fewer images are read before workers have started.
        workers = min(8, core_count()) if len(indices) >= 200 else 0
        # `disable=None` shows the bar on terminals only.
        with tqdm(total=len(indices), desc=title, unit='img', disable=None) as bar:
            for images, labels in DataLoader(Subset(self, indices), batch_size, num_workers=workers):
                yield images, labels
                bar.update(len(images))


def color_mode(channels: int, stated: str | None = None) -> str:
    """Returns Pillow's mode for a number of channels, or raises an error if `stated`, a file's mode, differs."""
    mode = _MODES.get(channels)
    if mode is None or stated not in (None, mode):
        what = f'{channels} channels' + (f' in the mode {stated}' if stated else '')
        raise ValueError(f'Images of {what} are not supported, expected 1 (L), 3 (RGB) or 4 (RGBA) channels.')
    return mode


def core_count() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def open_split(
    root: str | os.PathLike,
    split: str,
    channels: int = 3,
    class_map: str = '',
    class_names: Sequence[str] = (),
    need_split: bool = False,
) -> Images:
    """Opens a folder of images in folders, one for each class, or a .tar file of such folders.

    The class is the first folder below that of the split, whatever lies below it; in a .tar file it is the last one.
    Without a class map, a file with a name per line, folders are numbered in the order of a model's class names if all
    are among them, or of their own. `need_split` refuses data without splits: two of them would be the same images.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"There is no image folder '{root}', expected one with images in {split}/<class>/.")
    synonyms = next((names for names in _SPLITS if split in names), ())
    place = next((root / name for name in (split, *synonyms) if (root / name).exists()), root)
    others = [name for names in _SPLITS for name in names if (root / name).is_dir()]
    if place == root and (need_split or others):
        but = f', but with {", ".join(others)}' if others else ''
        raise ValueError(
            f"'{root}' is not a folder with the split '{split}'{but}: expected images in {split}/<class>/. Make these, "
            f'or name another split.'
        )
    archive: Any = None
    if place.suffix == '.tar' and place.is_file():
        archive, files, classes = _in_tar(place)
    else:
        files = _find_images(place, True)
        parts = [PurePath(file).relative_to(place).parts for file in files]
        # Images directly in the folder are of one class, named ''.
        classes = [names[0] if names[1:] else '' for names in parts]
    classes = [_composed(name) for name in classes]
    numbers = read_class_map(class_map, root)
    if numbers is None:
        numbers = _number(classes, class_names, place)
    kept = [index for index, name in enumerate(classes) if name in numbers]
    if not kept:
        of_map = f" of the classes in '{class_map}'" if class_map else ''
        raise ValueError(f"There are no images for the split '{split}' in '{root}', in {place}/<class>/{of_map}.")
    if left_out := len(classes) - len(kept):
        _logger.warning(f"'{place}': {left_out} images of classes that the class map lacks are left out.")
    if archive is not None:
        archive.samples = archive.samples[kept]
    labels = [numbers[classes[index]] for index in kept]
    return Images([files[index] for index in kept], channels, labels, numbers, place, archive)


def open_evaluation(
    root: str | os.PathLike,
    split: str,
    config: Mapping[str, Any],
    class_map: str = '',
    class_names: Sequence[str] = (),
    need_split: bool = False,
) -> Images:
    """Opens a split whose images are prepared as `timm.data.resolve_data_config` says, see `open_split`."""
    images = open_split(root, split, config['input_size'][0], class_map, class_names, need_split)
    images.transform = create_transform(**config)
    return images


def open_files(paths: Iterable[str | os.PathLike], config: Mapping[str, Any]) -> Images:
    """Opens image files, and all those in folders, prepared as `timm.data.resolve_data_config` says."""
    files: list[str] = []
    places = [*map(Path, paths)]
    for path in places:
        if not path.exists():
            raise FileNotFoundError(f"There is no image '{path}', expected a file such as photo.jpg, or a folder.")
        files += _find_images(path, False) if path.is_dir() else [os.fspath(path)]
    if not files:
        raise ValueError(f'There are no images in {", ".join(map(str, places)) or "an empty list"}.')
    images = Images(files, config['input_size'][0])
    images.transform = create_transform(**config)
    return images


def _find_images(folder: Path, in_classes: bool) -> list[str]:
    """Returns the images below a folder in natural order, without hidden ones, and logs what is left out."""
    found, others = [], Counter[str]()
    suffixes = _suffixes()
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = _shown(folders)
        # Images beside the class folders have no class.
        beside = in_classes and folders and Path(parent) == folder
        for name in _shown(files):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in suffixes and not beside:
                found.append(os.path.join(parent, name))
            else:
                others[suffix or name] += 1
    if others:
        what = ', '.join(f'{count} {suffix}' for suffix, count in others.most_common(5))
        where = ' in class folders' if in_classes else ''
        _logger.warning(f"'{folder}': {others.total()} files are ignored because they are not images{where}: {what}.")
    return sorted(found, key=_in_order)


def _in_order(name: str) -> tuple[list[Any], str]:
    """Sort key of timm's `natural_key`, which leaves equal what differs in case or leading zeros, and fails on '²'."""
    return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', name.lower())], name


def _shown(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith('.')]


def _suffixes() -> set[str]:
    Image.init()
    readable = Image.OPEN.keys() - _WITHOUT_PIXELS
    return {suffix for suffix, name in Image.registered_extensions().items() if name in readable}


def _in_tar(path: Path) -> tuple[Any, list[str], list[str]]:
    """Returns a reader of a .tar file, the names of the images in it, and the class of each."""
    set_img_extensions(sorted(_suffixes()))
    try:
        # With one open file, forked workers and threads would share its position.
        reader: Any = ReaderImageInTar(os.fspath(path), cache_tarfiles=False)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise ValueError(f"'{path}' is not a readable .tar file of images: {error}.") from None
    # A sample is a member, and the files that it is in.
    paths = [
        PurePath(inner.name.removesuffix('.tar') if inner else '', member.path) for member, _, inner in reader.samples
    ]
    parents = [path.parent for path in paths]
    if len(set(parents)) > len({parent.name for parent in parents}):
        raise ValueError(
            f"'{path}' has folders of the same name in several others, such as {parents[0]}: the last folder is the "
            f'class. Unpack it, or pack <class>/<image> alone.'
        )
    return reader, list(map(str, paths)), [parent.name for parent in parents]


def _composed(name: str) -> str:
    """Returns the name of a class in composed Unicode: folders that a Mac wrote have other code points."""
    return unicodedata.normalize('NFC', name)


def _number(classes: Sequence[str], class_names: Sequence[str], place: Path) -> dict[str, int]:
    """Returns the numbers of classes by name."""
    known = {_composed(name): number for number, name in enumerate(class_names)}
    if known and known.keys() >= set(classes):
        if missing := len(known.keys() - set(classes)):
            _logger.warning(f"'{place}' has no images of {missing} of the model's {len(known)} classes.")
        return known
    found = sorted(set(classes), key=_in_order)
    folders = next(os.walk(place), ((), (), ()))[1]
    if found != [''] and (empty := {name for name in _shown(folders) if _composed(name) not in found}):
        raise ValueError(
            f"'{place / min(empty)}' is the folder of a class without images, without which later classes have other "
            f'numbers. Remove it, or give the numbers of the classes by --class-map.'
        )
    return {name: number for number, name in enumerate(found)}


def read_class_map(class_map: str | None, root: str | os.PathLike | None) -> dict[str, int] | None:
    """Reads the numbers of classes by name from a text file, also looked for in the folder of images."""
    if not class_map:
        return None
    path = Path(class_map) if Path(class_map).is_file() else Path(root or '', class_map)
    with explaining(f"The class map '{class_map}' is not a text file with a name per line"):
        lines = path.read_text('utf-8').splitlines()
    return {_composed(line.strip()): number for number, line in enumerate(lines) if line.strip()}


def class_numbers(dataset: Any) -> dict[str, int]:
    """Returns the numbers of a dataset's classes by name; none if it does not name them."""
    for owner in (dataset, getattr(dataset, 'reader', None)):
        if found := getattr(owner, 'class_to_idx', None):
            return {str(name): int(number) for name, number in found.items()}
    return {str(name): number for number, name in enumerate(getattr(dataset, 'classes', ()))}


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
    if numbers and found and numbers != found:
        names = sorted({name for name, _ in numbers.items() ^ found.items()}, key=_in_order)
        raise ValueError(
            f'The training images have {len(numbers)} classes and the validation images {len(found)}; they differ in '
            f'{", ".join(map(repr, names[:5]))}{", …" * (len(names) > 5)}. Give both the same folders or --class-map.'
        )


def data_config_of(args: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Returns what `timm.data.resolve_data_config` does, for the channels of `in_chans`, which timm overlooks.

    A mean and standard deviation for three channels are averaged for another number of them, as timm's loader does.
    """
    channels = (args.get('input_size') or [args.get('in_chans') or 3])[0]

    def averaged(values: Mapping[str, Any]) -> dict[str, Any]:
        other = [name for name in ('mean', 'std') if len(values.get(name) or ()) not in (0, 1, channels)]
        return {**values, **{name: adapt_to_chs(values[name], channels) for name in other}}

    found = averaged(resolve_data_config(averaged(args), model=model))
    return {**found, 'input_size': (args.get('in_chans') or found['input_size'][0], *found['input_size'][1:])}
