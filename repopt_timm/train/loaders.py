"""Datasets and loaders, from timm's factories, and the quickstart's data."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import FastCollateMixup, Mixup, create_dataset, create_loader

from ..color_modes import color_mode
from ..datasets import check_same_classes, check_two_splits, open_folder, read_class_map
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
        mixup: Mixes a batch on the device, if that is not done in the loader.
        collate_mixup: Mixes in the loader, if so.
    """

    train: Any
    validation: Any
    mixup: Mixup | None
    collate_mixup: FastCollateMixup | None


def image_folder(args: argparse.Namespace) -> str | None:
    """Returns the folder of images that a run reads; None if its dataset is of another kind."""
    if args.dataset == _DIGITS:
        return args.data_dir or _DIGITS_FOLDER
    return None if args.dataset else args.data_dir


def make_datasets(args: argparse.Namespace) -> tuple[Any, Any]:
    """Makes training and validation set.

    Raises:
        FileNotFoundError: If the folder or class map does not exist.
        ValueError: If no data is named, the folder has no images or not both splits, or they have different classes,
            or both are one file.
    """
    name, root = args.dataset, args.data_dir
    if name == _DIGITS:
        name, root = '', root or _DIGITS_FOLDER
        write_digits(root)
    channels = args.in_chans or (args.input_size[0] if args.input_size else 3)
    common = {
        'root': root,
        'download': args.dataset_download,
        'batch_size': args.batch_size,
        'seed': args.seed,
        'input_img_mode': color_mode(channels, args.input_img_mode),
        'input_key': args.input_key,
        'target_key': args.target_key,
    }
    splits: list[dict[str, Any]] = [
        {'split': args.train_split, 'is_training': True, 'num_samples': args.train_num_samples},
        {'split': args.val_split, 'num_samples': args.val_num_samples},
    ]
    if args.holdout:
        splits.append({'split': args.train_split})
    if name:
        common['class_map'] = read_class_map(args.class_map, root) or ''
        with explaining(f'--dataset {name}'):
            opened = [create_dataset(name, **split, **common) for split in splits]
    else:
        if not args.holdout:
            check_two_splits(root, ', or validate on a part of it with --holdout')
        common['class_map'] = args.class_map
        opened = [open_folder(need_split=True, **split, **common) for split in splits]
    train, validation = opened[:2]
    check_same_classes(train, validation)
    return select_images(train, validation, opened[-1], args)


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
    mixup = collate_mixup = None
    if args.mixup > 0 or args.cutmix > 0:
        mixup_args = {
            'mixup_alpha': args.mixup,
            'cutmix_alpha': args.cutmix,
            'prob': args.mixup_prob,
            'switch_prob': args.mixup_switch_prob,
            'mode': args.mixup_mode,
            'label_smoothing': args.smoothing,
            'num_classes': num_classes,
        }
        if prefetcher:
            collate_mixup = FastCollateMixup(**mixup_args)
        else:
            mixup = Mixup(**mixup_args)
    common = {
        'input_size': data_config['input_size'],
        'mean': data_config['mean'],
        'std': data_config['std'],
        'num_workers': args.workers,
        'distributed': args.distributed,
        'pin_memory': args.pin_mem,
        'device': device,
        'use_prefetcher': prefetcher,
        'persistent_workers': False,
    }
    train = create_loader(
        datasets[0],
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        interpolation=args.train_interpolation,
        collate_fn=collate_mixup,
        **common,
    )
    validation = create_loader(
        datasets[1],
        batch_size=args.validation_batch_size or args.batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        **common,
    )
    return Loaders(train, validation, mixup, collate_mixup)


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
