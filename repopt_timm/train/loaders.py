"""Datasets and loaders, from timm's factories, parts of the training images, and the quickstart's data."""

import argparse
import multiprocessing
import signal
from collections.abc import Sequence
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from timm.data import FastCollateMixup, create_dataset, create_loader
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..datasets import (
    Images,
    check_same_classes,
    class_numbers,
    color_mode,
    count_classes,
    open_split,
    read_class_map,
)
from ..errors import explaining
from ..files import replacing

_DIGITS_FOLDER = 'output/digits'


def image_folder(args: argparse.Namespace) -> str | None:
    """Returns the folder of images that a run reads; None if its dataset is of another kind."""
    if args.dataset == 'digits':
        return args.data_dir or _DIGITS_FOLDER
    return None if args.dataset else args.data_dir


def make_datasets(args: argparse.Namespace) -> tuple[Any, Any]:
    """Makes training and validation set, and compares their classes with each other and with `--num-classes`."""
    channels = args.in_chans or (args.input_size[0] if args.input_size else 3)
    # With --holdout, the validation is on a part of the training split.
    splits = (args.train_split, args.train_split if args.holdout else args.val_split)
    if root := image_folder(args):
        if args.dataset:
            write_digits(Path(root))
        train, validation = (
            open_split(root, split, channels, args.class_map, need_split=not args.holdout) for split in splits
        )
        train.skip_damaged = True
    else:
        class_map: Any = read_class_map(args.class_map, args.data_dir) or ''
        create = partial(
            create_dataset,
            args.dataset,
            root=args.data_dir,
            class_map=class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            seed=args.seed,
            input_img_mode=color_mode(channels),
            input_key=args.input_key,
            target_key=args.target_key,
        )
        with explaining(f'--dataset {args.dataset}'):
            train = create(split=splits[0], is_training=True, num_samples=args.train_num_samples)
            validation = create(split=splits[1], num_samples=args.val_num_samples)
    check_same_classes(train, validation)
    asked, found = args.num_classes, count_classes(train)
    if found == 1:
        raise ValueError('The training images are all of one class, expected a folder for each of several.')
    if asked is None and found is None:
        raise ValueError('The data do not say how many classes they have: give --num-classes.')
    if asked is not None and found is not None and asked < found:
        raise ValueError(f'--num-classes is {asked}, but the data have {found} classes: raise it, or omit it.')
    return _select_images(train, validation, args)


def _select_images(train: Any, validation: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    """Applies `--train-images`, `--holdout`, `--sampler` and `--cache-images`."""
    if not (args.train_images or args.holdout or args.cache_images or args.sampler):
        return train, validation
    if isinstance(train, IterableDataset):
        raise ValueError('--train-images, --holdout, --sampler and --cache-images do not go with streamed images.')
    count = len(train)
    # The same images for every --seed, so that all runs solve the same task.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    held_out = round(args.holdout * count)
    left = count - held_out
    if args.holdout and not 0 < held_out < count:
        raise ValueError(f'--holdout is {args.holdout:g} of {count} training images, which leaves one part empty.')
    if args.train_images and args.train_images > left:
        raise ValueError(
            f'--train-images is {args.train_images}, but there are {left} with --holdout {args.holdout:g}: lower it.'
        )
    chosen = sorted(order[: args.train_images or left])
    held = sorted(order[left:]) if args.holdout else range(len(validation))
    return (
        SelectedImages(train, chosen, args.cache_images, args.sampler == 'balanced'),
        SelectedImages(validation, held, args.cache_images),
    )


class SelectedImages(Dataset):
    """Some images of a dataset without a transform, decoded once if they are to be kept.

    If balanced, each epoch draws with replacement, so that classes come equally often. `labels` belong to `indices`.
    """

    def __init__(self, dataset: Any, indices: Sequence[int], keep: bool, balanced: bool = False):
        self.dataset = dataset
        self.indices = self.order = indices
        self.keep, self.balanced = keep, balanced
        # Set by timm's loaders.
        self.transform: Any = None
        self.class_to_idx = class_numbers(dataset)
        found = labels_of(dataset)
        self.labels = None if found is None else found[list(indices)]
        self._kept: dict[int, tuple[Any, int]] = {}
        if balanced and found is None:
            raise ValueError('--sampler needs data that list their labels, such as a folder of images.')

    def set_epoch(self, epoch: int) -> None:
        """Draws the images of an epoch; its random numbers depend on the epoch alone."""
        if self.balanced and self.labels is not None:
            weights = 1 / self.labels.bincount()[self.labels].double()
            # The same on all ranks, whose samplers share the images out.
            generator = torch.Generator().manual_seed(epoch)
            drawn = torch.multinomial(weights, len(self), replacement=True, generator=generator)
            self.order = [self.indices[index] for index in drawn.tolist()]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        index = self.order[index]
        found = self._kept.get(index) or self.dataset[index]
        if self.keep:
            self._kept[index] = found
        image, label = found
        return (image if self.transform is None else self.transform(image)), label


def labels_of(dataset: Any) -> Tensor | None:
    """Returns the labels of folders and archives, of timm's data sets, and of torchvision's; None without a list."""
    labels = getattr(dataset, 'labels' if isinstance(dataset, SelectedImages | Images) else 'targets', None)
    samples = getattr(getattr(dataset, 'reader', None), 'samples', None)
    if labels is None and isinstance(samples, Sequence):
        labels = [sample[1] for sample in samples]
    return None if labels is None else torch.tensor([int(label) for label in labels])


def make_loaders(
    args: argparse.Namespace,
    datasets: tuple[Any, Any],
    data_config: dict[str, Any],
    num_classes: int,
    device: torch.device,
) -> tuple[Any, Any]:
    """Makes the loaders of both datasets; that for training mixes images.

    Workers are started anew each epoch: only then do their random numbers depend on the epoch's seed alone, and a
    resumed run sees what an uninterrupted one does.
    """
    if args.workers:
        # Runs before multiprocessing's own exit handler, which sends workers a SIGTERM and waits.
        Finalize(None, _kill_workers, (frozenset(multiprocessing.active_children()),), exitpriority=0)
    mix = None
    if args.mixup > 0 or args.cutmix > 0:
        mix = FastCollateMixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )
    common: dict[str, Any] = dict(
        **{name: data_config[name] for name in ('input_size', 'mean', 'std')},
        num_workers=args.workers,
        distributed=args.distributed,
        pin_memory=args.pin_mem,
        device=device,
        persistent_workers=False,
        worker_seeding=_seed_worker,
    )
    same = ('batch_size', 'no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter')
    train = create_loader(
        datasets[0],
        **common,
        is_training=True,
        **{name: getattr(args, name) for name in same},
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        interpolation=args.train_interpolation,
        collate_fn=mix,
    )
    validation = create_loader(
        datasets[1],
        **common,
        batch_size=args.validation_batch_size or args.batch_size,
        **{name: data_config[name] for name in ('interpolation', 'crop_pct', 'crop_mode')},
    )
    return train, validation


def _seed_worker(worker: Any) -> int:
    """Returns the seed of a loader's worker, as timm's default does, and lets the worker outlive a SIGTERM."""
    # A batch system sends it to the whole group, where a worker that ends first is an error in the run.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return worker.seed


def _kill_workers(others: frozenset[Any]) -> None:
    """Ends the workers that an interrupted epoch has left; `others` are processes from before the run."""
    # Torch's handler raises when it sees the first one end.
    if hasattr(signal, 'SIGCHLD'):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon and child not in others:
            child.kill()


def write_digits(root: Path) -> None:
    """Writes `train/<digit>/<index>.png` and `validation/...`, every fourth image for validation, if not there yet."""
    from PIL import Image

    if (done := root / 'complete').exists():
        return
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("The digits need scikit-learn: pip install 'repopt-timm[quickstart]'.") from None
    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target)):
        split = 'validation' if index % 4 == 0 else 'train'
        with replacing(root / split / str(label) / f'{index:04d}.png') as temporary:
            Image.fromarray((pixels * 255 / 16).round().astype('uint8')).save(temporary)
    done.touch()
