"""Datasets and loaders, from timm's factories, and the quickstart's data."""

import argparse
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import FastCollateMixup, Mixup, create_dataset, create_loader

from ..datasets import (
    check_same_classes,
    color_mode,
    count_classes,
    open_split,
    read_class_map,
)
from ..errors import explaining
from ..files import replacing
from .selection import select_images

__all__ = ['Loaders', 'image_folder', 'make_datasets', 'make_loaders', 'write_digits']

_DIGITS = 'digits'
_DIGITS_FOLDER = 'output/digits'
_DONE = 'complete'


@dataclass
class Loaders:
    """What an epoch reads from.

    Attributes:
        train: Batches of training images and labels.
        validation: Batches of validation images and labels.
        mixup: Mixes a batch on the device, if the training loader does not do it.
    """

    train: Any
    validation: Any
    mixup: Mixup | None


def image_folder(args: argparse.Namespace) -> str | None:
    """Returns the folder of images that a run reads; None if its dataset is of another kind."""
    if args.dataset == _DIGITS:
        return args.data_dir or _DIGITS_FOLDER
    return None if args.dataset else args.data_dir


def make_datasets(args: argparse.Namespace) -> tuple[Any, Any]:
    """Makes training and validation set.

    Raises:
        FileNotFoundError: If the folder or class map does not exist.
        ValueError: If the folder has no images or not both splits, they have different classes, one class only, or
            more than `--num-classes`.
    """
    root = args.data_dir
    if args.dataset == _DIGITS:
        root = root or _DIGITS_FOLDER
        write_digits(root)
    channels = args.in_chans or (args.input_size[0] if args.input_size else 3)
    # With --holdout, the validation is on a part of the training split.
    splits = (args.train_split, args.train_split if args.holdout else args.val_split)
    if args.dataset in ('', _DIGITS):
        train, validation = (
            open_split(root, split, channels, args.class_map, need_split=not args.holdout) for split in splits
        )
        train.skip_damaged = True
    else:
        common = {
            'root': root,
            'class_map': read_class_map(args.class_map, root) or '',
            'download': args.dataset_download,
            'batch_size': args.batch_size,
            'seed': args.seed,
            'input_img_mode': color_mode(channels),
            'input_key': args.input_key,
            'target_key': args.target_key,
        }
        with explaining(f'--dataset {args.dataset}'):
            train = create_dataset(
                args.dataset, split=splits[0], is_training=True, num_samples=args.train_num_samples, **common
            )
            validation = create_dataset(args.dataset, split=splits[1], num_samples=args.val_num_samples, **common)
    check_same_classes(train, validation)
    asked, found = args.num_classes, count_classes(train)
    if found == 1:
        raise ValueError('The training images are all of one class, expected a folder for each of several.')
    if asked is None and found is None:
        raise ValueError('The data do not state their number of classes: give it with --num-classes.')
    if asked is not None and found is not None and asked < found:
        raise ValueError(f'--num-classes is {asked}, but the data have {found} classes: raise it, or omit it.')
    return select_images(train, validation, args)


def make_loaders(
    args: argparse.Namespace,
    datasets: tuple[Any, Any],
    data_config: dict[str, Any],
    num_classes: int,
    device: torch.device,
) -> Loaders:
    """Makes the loaders of both datasets.

    Workers are started anew each epoch: only then do their random numbers depend on the epoch's seed alone, and a
    resumed run sees what an uninterrupted one does.
    """
    prefetcher = not args.no_prefetcher
    mix: Any = None
    if args.mixup > 0 or args.cutmix > 0:
        mix = (FastCollateMixup if prefetcher else Mixup)(
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
        use_prefetcher=prefetcher,
        persistent_workers=False,
        worker_seeding=_seed_worker,
    )
    same = ('no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter')
    train = create_loader(
        datasets[0],
        **common,
        batch_size=args.batch_size,
        is_training=True,
        **{name: getattr(args, name) for name in same},
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        interpolation=args.train_interpolation,
        collate_fn=mix if prefetcher else None,
    )
    validation = create_loader(
        datasets[1],
        **common,
        batch_size=args.validation_batch_size or args.batch_size,
        **{name: data_config[name] for name in ('interpolation', 'crop_pct', 'crop_mode')},
    )
    return Loaders(train, validation, None if prefetcher else mix)


def _seed_worker(worker: Any) -> int:
    """Returns the seed of a loader's worker, as timm's default does, and lets the worker outlive a SIGTERM."""
    # A batch system sends it to the whole group, where a worker that ends first is an error in the run. A worker ends
    # with its run.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return worker.seed


def write_digits(root: str | Path) -> None:
    """Writes the images as `train/<digit>/<index>.png` and `validation/...`, every fourth image for validation.

    Args:
        root: Folder to write to; nothing happens if the images are there already.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    from PIL import Image

    root = Path(root)
    if (root / _DONE).exists():
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
    (root / _DONE).touch()
