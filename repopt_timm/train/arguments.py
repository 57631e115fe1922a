"""Arguments of a training run: named and defaulted like those of timm's training script."""

import argparse
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from timm.utils import ParseKwargs

from ..resources import resource_dir

__all__ = ['make_parser', 'parse_arguments', 'read_config']


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of `train.py` and `repopt-timm train`."""
    parser = argparse.ArgumentParser(
        prog='train',
        description='Search scales (_hs models), validate with _csla models, or train RepOpt-VGG targets.',
    )
    add = parser.add_argument
    add(
        '-c', '--config', metavar='FILE', help='YAML file of arguments, or the name of a shipped one such as quickstart'
    )

    add = parser.add_argument_group('Data').add_argument
    add('data', nargs='?', metavar='DIR', help='path to dataset (same as --data-dir)')
    add('--data-dir', metavar='DIR', help='path to dataset: image folders, or .tar files')
    add(
        '--dataset',
        metavar='NAME',
        default='',
        help='dataset type, such as torch/cifar10, hfds/NAME, wds/NAME, digits (default: image folder or .tar). '
        'Streamed data (wds/, hfids/) is not repeated exactly when a run is resumed.',
    )
    add('--train-split', metavar='NAME', default='train', help='dataset train split')
    add('--val-split', metavar='NAME', default='validation', help='dataset validation split')
    add('--train-num-samples', type=int, help='number of training samples, for streamed data')
    add('--val-num-samples', type=int, help='number of validation samples, for streamed data')
    add('--dataset-download', action='store_true', help='allow download for torch/ and other datasets that support it')
    add('--class-map', default='', metavar='FILE', help='path to class to index mapping file')
    add('--input-img-mode', help='image color mode, such as RGB or L')
    add('--input-key', help='dataset key of the images')
    add('--target-key', help='dataset key of the labels')

    add = parser.add_argument_group('Model').add_argument
    add('--model', default='repopt_vgg_a0', help='name of a timm model; _hs for a search, _csla for validation')
    add(
        '--scales',
        metavar='SOURCE',
        help="scales: a file, a folder with a model card, 'hf-hub:user/repo[@revision]', the name of scales that ship, "
        "or 'initial' for the unsearched values (default: those that ship for a target)",
    )
    add('--pretrained', action='store_true', help='start from pretrained weights')
    add('--initial-checkpoint', default='', metavar='FILE', help='start from the weights of a checkpoint')
    add(
        '--resume',
        nargs='?',
        const='auto',
        metavar='FILE',
        help='continue a run from its checkpoint, in its folder; without FILE from last.pth.tar in '
        '--output/--experiment if there is one, else from the start',
    )
    add('--num-classes', type=int, help="number of classes (default: the dataset's)")
    add('--gp', metavar='POOL', help='global pool type')
    add('--img-size', type=int, help='image size, for square images')
    add('--in-chans', type=int, help='number of image channels')
    add('--input-size', nargs=3, type=int, metavar='N', help='image dimensions: channels height width')
    add('--crop-pct', type=float, help='center crop percent, for validation')
    add('--mean', type=float, nargs='+', help='mean pixel value')
    add('--std', type=float, nargs='+', help='standard deviation of pixel values')
    add('--interpolation', default='', help='resize interpolation')
    add('-b', '--batch-size', type=int, default=128, help='batch size of each process')
    add('-vb', '--validation-batch-size', type=int, help='batch size for validation')
    add('--channels-last', action='store_true', help='channels_last memory layout')
    add('--grad-accum-steps', type=int, default=1, help='batches to accumulate gradients of before a step')
    add('--grad-checkpointing', action='store_true', help='recompute activations in the backward pass')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='further model arguments')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile the model')

    add = parser.add_argument_group('Device').add_argument
    add('--device', help='device to train on (default: cuda where there is one, else cpu)')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='lower precision of --amp')

    add = parser.add_argument_group('Optimizer').add_argument
    add('--opt', help='optimizer (default: repopt_sgd for a RepOpt-VGG target, else sgd)')
    add('--opt-eps', type=float, help='epsilon of the optimizer')
    add('--opt-betas', type=float, nargs='+', help='betas of the optimizer')
    add('--momentum', type=float, default=0.9, help='momentum')
    add('--weight-decay', type=float, default=2e-5, help='weight decay')
    add(
        '--clip-grad', type=float, metavar='NORM', help='clip gradients; RepOptimizers measure the equivalent CSLA norm'
    )
    add('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='how to clip; RepOptimizers: norm only')
    add('--layer-decay', type=float, help='layer-wise learning rate decay')
    add('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='further optimizer arguments')

    add = parser.add_argument_group('Learning rate schedule').add_argument
    add('--sched', default='cosine', help='schedule')
    add('--sched-on-updates', action='store_true', help='step the schedule on updates instead of epochs')
    add('--lr', type=float, help='learning rate; overrides --lr-base')
    add(
        '--lr-base',
        type=float,
        default=0.1,
        help='learning rate at --lr-base-size: lr = lr_base * batch size / base size',
    )
    add('--lr-base-size', type=int, default=256, help='global batch size of --lr-base')
    add('--lr-base-scale', default='', choices=('', 'linear', 'sqrt'), help='how --lr-base scales (default: by --opt)')
    add('--warmup-lr', type=float, default=1e-5, help='learning rate that the warm-up starts from')
    add('--min-lr', type=float, default=0.0, help='lower bound of the learning rate')
    add('--epochs', type=int, default=300, help='number of epochs')
    add('--warmup-epochs', type=int, default=5, help='epochs of warm-up')
    add('--cooldown-epochs', type=int, default=0, help='epochs at the lowest learning rate, after the schedule')
    add('--decay-epochs', type=float, default=90, help='interval of the step schedule')
    add('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], help='epochs of the multistep schedule')
    add('--decay-rate', type=float, default=0.1, help='factor of the step schedules')
    add('--patience-epochs', type=int, default=10, help='patience of the plateau schedule')

    add = parser.add_argument_group('Augmentation and regularization').add_argument
    add('--no-aug', action='store_true', help='no training augmentation')
    add('--train-crop-mode', help='crop mode in train: rrc, rkrc, rkrr')
    add('--scale', type=float, nargs='+', default=[0.08, 1.0], help='range of the random crop area')
    add('--ratio', type=float, nargs='+', default=[3 / 4, 4 / 3], help='range of the random aspect ratio')
    add('--hflip', type=float, default=0.5, help='probability of a horizontal flip')
    add('--vflip', type=float, default=0.0, help='probability of a vertical flip')
    add('--color-jitter', type=float, default=0.4, help='color jitter')
    add('--aa', help='AutoAugment policy, such as rand-m9-mstd0.5')
    add('--reprob', type=float, default=0.0, help='probability of random erasing')
    add('--remode', default='pixel', help='mode of random erasing')
    add('--recount', type=int, default=1, help='count of random erasing')
    add('--mixup', type=float, default=0.0, help='mixup alpha')
    add('--cutmix', type=float, default=0.0, help='cutmix alpha')
    add('--mixup-prob', type=float, default=1.0, help='probability of mixup or cutmix')
    add('--mixup-switch-prob', type=float, default=0.5, help='probability of cutmix when both are on')
    add('--mixup-mode', default='batch', help='mixup per batch, pair or elem')
    add('--mixup-off-epoch', type=int, default=0, help='turn mixup off after this epoch')
    add('--bce-loss', action='store_true', help='binary cross entropy')
    add('--smoothing', type=float, default=0.1, help='label smoothing')
    add('--train-interpolation', default='random', help='interpolation of training images')
    add('--drop', type=float, default=0.0, help='dropout rate of the classifier')

    add = parser.add_argument_group('BatchNorm and weight averaging').add_argument
    add('--sync-bn', action='store_true', help='synchronized BatchNorm, on GPUs')
    add(
        '--dist-bn',
        default='reduce',
        choices=('', 'broadcast', 'reduce'),
        help='BatchNorm statistics between processes',
    )
    add('--model-ema', action='store_true', help='keep an exponential moving average of the weights')
    add('--model-ema-decay', type=float, default=0.9998, help='decay of the average')
    add('--model-ema-warmup', action='store_true', help='warm the decay up')

    add = parser.add_argument_group('Run').add_argument
    add('--seed', type=int, default=42, help='random seed; epochs are seeded one by one, so that a resumed run repeats')
    add('--log-interval', type=int, default=50, help='batches between lines of progress')
    add('--val-interval', type=int, default=1, help='epochs between validations')
    add('--checkpoint-hist', type=int, default=3, help='number of best checkpoints to keep')
    add('-j', '--workers', type=int, default=4, help='processes that load data')
    add('--pin-mem', action='store_true', help='pin memory, for GPUs')
    add('--no-prefetcher', action='store_true', help="do without timm's prefetcher")
    add('--output', default='output', metavar='DIR', help='folder of runs')
    add(
        '--experiment',
        default='',
        metavar='NAME',
        help="folder of this run in --output (default: time and model's name)",
    )
    add('--log-tensorboard', action='store_true', help='log to TensorBoard, if installed')
    add('--log-wandb', action='store_true', help='log to Weights & Biases, if installed')

    add = parser.add_argument_group('Whole way').add_argument
    add('--search-first', action='store_true', help='search the scales, then train --model with them, then report')
    add(
        '--search-kwargs',
        nargs='*',
        default={},
        action=ParseKwargs,
        metavar='K=V',
        help='arguments of the search that differ, such as data_dir=... epochs=... lr=...',
    )
    return parser


def read_config(name: str) -> dict[str, Any]:
    """Reads a YAML file of arguments.

    Args:
        name: A path, or the name of a config that ships with the package, without suffix.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no mapping.
    """
    shipped = resource_dir('configs')
    path = Path(name) if Path(name).is_file() else shipped / f'{name}.yaml'
    if not path.is_file():
        names = ', '.join(sorted(file.stem for file in shipped.glob('*.yaml')))
        raise FileNotFoundError(f"There is no config '{name}'. Give a YAML file, or one of those that ship: {names}.")
    config = yaml.safe_load(path.read_text(encoding='utf-8'))
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' holds a {type(config).__name__}, expected 'argument: value' lines.")
    return config


def check_names(names: Sequence[str], parser: argparse.ArgumentParser, where: str) -> None:
    """Checks that all names are arguments of the parser.

    Raises:
        ValueError: If one is not; suggests the nearest that is.
    """
    known = {action.dest for action in parser._actions}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean '{near[0]}'?" if near else ''
            raise ValueError(f"{where}: unknown argument '{name}'.{hint}")


def _typed(parser: argparse.ArgumentParser, name: str, value: Any) -> Any:
    # What YAML takes for text, such as 4e-5.
    action = next(action for action in parser._actions if action.dest == name)
    return action.type(value) if isinstance(value, str) and callable(action.type) else value


def _check_choices(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    # argparse checks what is on the command line, not what a config sets.
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.choices and value is not None and value not in action.choices:
            raise ValueError(f"'{action.dest}' is {value!r}, expected one of {', '.join(map(repr, action.choices))}.")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; values of the `-c` file replace the defaults.

    Raises:
        FileNotFoundError: If there is no such config.
        ValueError: If the config, or `--search-kwargs`, has an unknown argument.
    """
    parser = make_parser()
    config_name = parser.parse_known_args(argv)[0].config
    if config_name:
        config = read_config(config_name)
        check_names(list(config), parser, config_name)
        parser.set_defaults(**config)
    args = parser.parse_args(argv)
    check_names(list(args.search_kwargs), parser, '--search-kwargs')
    args.search_kwargs = {name: _typed(parser, name, value) for name, value in args.search_kwargs.items()}
    _check_choices(args, parser)
    args.resume = 'auto' if args.resume is True else args.resume
    args.data_dir = args.data or args.data_dir
    if args.data_dir and Path(args.data_dir).name in ('', '..'):
        # Cards tell the folder's name.
        args.data_dir = os.path.abspath(args.data_dir)
    return args
