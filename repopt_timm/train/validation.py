"""Checks that arguments go together and name things that exist, before anything is built or written."""

import argparse
import difflib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import ImageMode
from timm.data import dataset_factory
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.models import parse_model_name
from timm.optim import get_optimizer_info, list_optimizers

from ..color_modes import COLOR_MODES
from ..errors import explaining
from ..models import ensure_registered
from ..names import PREFIX, ModelName
from ..reparam.modules import pair

__all__ = ['check_arguments', 'check_classes', 'check_device_name', 'check_images', 'check_layout', 'check_model']

_REPOPT = ('repopt_sgd', 'repopt_adamw')
_TORCH_DATASETS = ('inaturalist', 'inat', 'places365', 'qmnist', 'imagenet', 'image_folder', 'folder')
_PREFIXES = {'hfds': 'datasets', 'hfids': 'datasets', 'tfds': 'tensorflow_datasets', 'wds': 'webdataset'}
_OPTIMIZER_FLAGS = {
    'lr': 'lr',
    'weight_decay': 'weight-decay',
    'momentum': 'momentum',
    'eps': 'opt-eps',
    'betas': 'opt-betas',
    'layer_decay': 'layer-decay',
}
_MOST_NAMES = 20


def check_arguments(args: argparse.Namespace) -> None:
    """Checks all that can be known without data, model or network.

    Raises:
        ValueError: If arguments do not go together, or name what does not exist.
        FileNotFoundError: If a file or folder does not exist.
        ImportError: If they need a package that is not installed.
    """
    for check in _CHECKS:
        check(args)


def _unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 3)
    some = ', '.join(names[:_MOST_NAMES]) + (', …' if len(names) > _MOST_NAMES else '')
    hint = f'Did you mean {" or ".join(near)}?' if near else f'Expected one of {some}.'
    return ValueError(f"{what} '{name}' is unknown. {hint}")


def _check_paths(args: argparse.Namespace) -> None:
    if not args.data_dir and not args.dataset:
        raise ValueError('No data: give the path of an image folder, or --dataset, or try -c quickstart.')
    for name in ('initial_checkpoint', 'resume'):
        path = getattr(args, name)
        if path and path != 'auto' and not Path(path).is_file():
            raise FileNotFoundError(f"--{name.replace('_', '-')}: there is no checkpoint file '{path}'.")
    if not args.output:
        raise ValueError("--output is '', expected the name of a folder, such as output.")
    if args.experiment and (Path(args.experiment).is_absolute() or '..' in Path(args.experiment).parts):
        raise ValueError(f"--experiment is '{args.experiment}', expected a name inside of --output.")
    folder = Path(args.output) / args.experiment
    for part in (folder, *folder.parents):
        if os.path.lexists(part):
            if not part.is_dir():
                raise ValueError(f"'{part}' is not a folder: choose another --output or --experiment.")
            if not os.access(part, os.W_OK):
                raise ValueError(f"The folder '{part}' cannot be written to: choose another --output.")
            return


def _check_dataset(args: argparse.Namespace) -> None:
    prefix, separator, name = args.dataset.partition('/')
    prefix = prefix.lower()
    if args.target_key is not None and prefix not in _PREFIXES:
        raise ValueError('--target-key is for --dataset hfds/, hfids/, tfds/ and wds/: remove it for other data.')
    if args.dataset in ('', 'digits'):
        return
    known = ', '.join(f'{each}/NAME' for each in ('torch', *_PREFIXES))
    if not separator or prefix not in ('torch', *_PREFIXES):
        raise ValueError(
            f"--dataset is '{args.dataset}', expected digits, {known}, or none for a folder of images (--data-dir)."
        )
    if not name:
        raise ValueError(f"--dataset is '{args.dataset}', which names no data set, expected {prefix}/NAME.")
    if prefix == 'torch':
        known_names = (*dataset_factory._TORCH_BASIC_DS, *_TORCH_DATASETS)
        if name.lower() not in known_names:
            raise _unknown('--dataset torch/', name, known_names)
        if not args.data_dir:
            raise ValueError(f'--dataset {args.dataset} needs --data-dir, the folder that the data are in.')
    elif importlib.util.find_spec(_PREFIXES[prefix]) is None:
        raise ImportError(f'--dataset {prefix}/ needs {_PREFIXES[prefix]}: pip install {_PREFIXES[prefix]}.')


def _check_cache(args: argparse.Namespace) -> None:
    if args.cache_images and args.workers:
        raise ValueError(
            f'--cache-images needs --workers 0, but --workers is {args.workers}: what a worker decodes is lost with it '
            f'after each epoch.'
        )


def _check_channels(args: argparse.Namespace) -> None:
    size, channels = args.input_size, args.in_chans
    if size and channels and size[0] != channels:
        raise ValueError(f'--in-chans is {channels} and --input-size has {size[0]} channels, expected the same.')
    if size and args.img_size and size[1:] != [args.img_size] * 2:
        raise ValueError(f'--img-size is {args.img_size} and --input-size {size}: give one of them.')
    channels = channels or (size[0] if size else 3)
    if channels not in COLOR_MODES:
        raise ValueError(f'--input-size has {channels} channels, expected 1 to 4, which images can have.')
    if args.input_img_mode:
        bands = len(ImageMode.getmode(args.input_img_mode).bands)
        if bands != channels:
            raise ValueError(
                f'--input-img-mode {args.input_img_mode} has {bands} channels and the model {channels}: choose '
                f'--input-img-mode {COLOR_MODES[channels]} or --in-chans {bands}.'
            )
    elif channels in (2, 4):
        raise ValueError(f'Images of {channels} channels need --input-img-mode, such as {COLOR_MODES[channels]}.')
    for name in ('mean', 'std'):
        values = getattr(args, name)
        if values and len(values) not in (1, channels):
            raise ValueError(f'--{name} has {len(values)} values, expected 1 or one for each of {channels} channels.')


def _check_ranges(args: argparse.Namespace) -> None:
    for name in ('scale', 'ratio'):
        low, high = getattr(args, name)
        if low > high:
            raise ValueError(f'--{name} is {low:g} {high:g}, expected the smaller value first.')


def _check_mixup(args: argparse.Namespace) -> None:
    if not (args.mixup > 0 or args.cutmix > 0):
        return
    if args.batch_size % 2:
        raise ValueError(
            f'--mixup and --cutmix mix pairs of images, and --batch-size is {args.batch_size}, expected an even number.'
        )


def _check_augmentation(args: argparse.Namespace) -> None:
    if not args.aa:
        return
    make: Callable[..., Any] = auto_augment_transform
    if args.aa.startswith('rand'):
        make = rand_augment_transform
    elif args.aa.startswith('augmix'):
        make = augment_and_mix_transform
    # timm passes over an option without a number.
    if not all(any(char.isdigit() for char in option) for option in args.aa.split('-')[1:]):
        raise _bad_policy(args.aa)
    try:
        make(args.aa, {'translate_const': 10, 'img_mean': (124, 116, 104)})
    except (AssertionError, ValueError, KeyError, IndexError, TypeError):
        raise _bad_policy(args.aa) from None


def _bad_policy(name: str) -> ValueError:
    return ValueError(
        f"--aa is '{name}', expected a policy of timm: rand-m9-mstd0.5, augmix-m5-w4, v0, v0r, original, originalr, "
        f'3a, each with such options.'
    )


def _check_device(args: argparse.Namespace) -> None:
    # `prepare_device` has chosen one by now.
    kind = args.device.partition(':')[0]
    if args.sync_bn and kind != 'cuda':
        raise ValueError(f'--sync-bn works on GPUs, not on {kind}. Remove it; --dist-bn averages the statistics.')


def check_device_name(name: str | None) -> None:
    """Checks that a device exists and has float64.

    Raises:
        ValueError: If not.
    """
    if name is None:
        return
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device is '{name}', expected cpu, cuda, cuda:1 and the like.") from None
    if device.type == 'mps':
        raise ValueError(f"--device is '{name}', which has no float64 to sum in. Try --device cpu.")
    if device.type == 'cpu':
        available = (device.index or 0) == 0
    elif device.type == 'cuda':
        available = torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    else:
        available = getattr(getattr(torch, device.type, None), 'is_available', lambda: False)()
    if not available:
        raise ValueError(f"--device is '{name}', which this machine does not have. Try --device cpu.")


def _check_compile(args: argparse.Namespace) -> None:
    if not args.torchcompile:
        return
    backends = torch._dynamo.list_backends(exclude_tags=())
    if args.torchcompile not in backends:
        raise _unknown('--torchcompile', args.torchcompile, torch._dynamo.list_backends())


def _check_model(args: argparse.Namespace) -> None:
    source, name = parse_model_name(args.model)
    if not name:
        raise ValueError(f"--model is '{args.model}', expected the name of a timm model, such as repopt_vgg_a0.")
    if 'scales' in args.model_kwargs:
        raise ValueError('Give scales with --scales instead of --model-kwargs.')
    for key in ('num_classes', 'in_chans', 'drop_rate', 'global_pool', 'pretrained'):
        if key in args.model_kwargs:
            raise ValueError(f'--model-kwargs has {key}, which has a flag of its own.')
    if source == 'local-dir' and not Path(name, 'config.json').is_file():
        raise FileNotFoundError(f"--model: there is no model in '{name}', expected a folder with a config.json.")
    kind = ModelName.parse(name).kind
    if source is None and kind == 'hs' and args.scales:
        raise ValueError(f'--model {args.model} searches scales, so it does not take --scales.')
    if source is None and kind == 'branches' and args.scales:
        raise ValueError(f'--model {args.model} has branches instead of scales, so it does not take --scales.')


def _check_optimizer(args: argparse.Namespace) -> None:
    if args.opt is None:
        return
    name = args.opt.removeprefix('lookahead_')
    # One name each, of the two that the factory knows.
    known = {*map(str, list_optimizers()), *_REPOPT} - {each.replace('_', '') for each in _REPOPT}
    if name not in known:
        raise _unknown('--opt', args.opt, known)
    opt_class: Any = get_optimizer_info(name.replace('_', '')).opt_class
    if isinstance(opt_class, str):
        # timm imports it when it is made.
        package = opt_class.partition('.')[0]
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'--opt {args.opt} needs {package}: pip install {package}.')
        return
    accepted = {*_parameters(opt_class), *_parameters(timm.optim.create_optimizer_v2)} - {'self', 'kwargs'}
    for key in args.opt_kwargs:
        if key not in accepted and key != 'grad_mults':
            raise _unknown(f'--opt-kwargs of {args.opt}:', key, accepted - {'model_or_params', 'params'})
        if key in _OPTIMIZER_FLAGS:
            raise ValueError(f'--opt-kwargs has {key}, which has a flag of its own: --{_OPTIMIZER_FLAGS[key]}.')
        if key in ('params', 'model_or_params', 'opt'):
            raise ValueError(f"--opt-kwargs: '{key}' is not an option of the optimizer; remove it.")
    if name in _REPOPT and args.clip_grad is not None and args.clip_mode != 'norm':
        raise ValueError(
            f'--clip-mode {args.clip_mode} breaks the equivalence with the CSLA network. With {args.opt} use '
            f"--clip-mode norm, which measures that network's norm."
        )


def _check_schedule(args: argparse.Namespace) -> None:
    if args.decay_milestones != sorted(set(args.decay_milestones)):
        raise ValueError(f'--decay-milestones are {args.decay_milestones}, expected rising epochs.')
    if args.sched == 'plateau' and args.sched_on_updates:
        raise ValueError("--sched plateau waits for an epoch's accuracy: remove --sched-on-updates or set it to false.")
    if args.lr is not None and args.min_lr > args.lr:
        raise ValueError(f'--min-lr is {args.min_lr} and --lr {args.lr}, expected a lower bound: lower --min-lr.')


def _parameters(function: Any) -> set[str]:
    names: set[str] = set()
    # A subclass that takes **kwargs hands them on.
    for owner in inspect.getmro(function) if inspect.isclass(function) else (function,):
        if owner in (object, torch.optim.Optimizer):
            break
        names |= set(inspect.signature(owner).parameters)
    return names


def _check_loggers(args: argparse.Namespace) -> None:
    if args.log_tensorboard and importlib.util.find_spec('tensorboard') is None:
        raise ImportError('--log-tensorboard needs TensorBoard: pip install tensorboard.')
    if args.log_wandb and importlib.util.find_spec('wandb') is None:
        raise ImportError('--log-wandb needs Weights & Biases: pip install wandb.')


def _check_search(args: argparse.Namespace) -> None:
    if not args.search_first:
        if args.search_kwargs:
            raise ValueError('--search-kwargs are for --search-first: add it, or give the values as flags.')
        return
    if args.scales:
        raise ValueError('--search-first searches the scales itself, so it does not go with --scales.')
    name = ModelName.parse(args.model)
    if parse_model_name(args.model)[0] is not None or name.kind != 'target' or PREFIX not in name.architecture:
        target = name.architecture if PREFIX in name.architecture else PREFIX + name.architecture
        ensure_registered(target)
        raise ValueError(
            f"--model is '{args.model}', which --search-first has no search for, expected the name of a target, such "
            f'as {target if timm.is_model(target) else "repopt_vgg_a0"}.'
        )
    if args.resume and args.resume != 'auto':
        raise ValueError('--search-first is continued with --resume alone: it finds out itself how far it got.')
    for key in ('search_first', 'search_kwargs', 'model', 'scales', 'resume', 'output', 'experiment', 'debug'):
        if key in args.search_kwargs:
            raise ValueError(f"--search-kwargs: '{key}' cannot differ in the search; remove it.")
    sgd = any(name in (args.opt or 'sgd') for name in ('sgd', 'momentum', 'nesterov'))
    if not sgd and not {'opt', 'lr'} & set(args.search_kwargs):
        raise ValueError(
            f'The search uses SGD, which the learning rate of {args.opt} does not suit. Give it its own, such as '
            f'--search-kwargs lr=0.1.'
        )


def check_classes(num_classes: int | None, found: int | None) -> None:
    """Checks a number of classes against those of the data.

    Raises:
        ValueError: If it is smaller, or neither is known.
    """
    if num_classes is None and found is None:
        raise ValueError('The data do not state their number of classes: give it with --num-classes.')
    if num_classes is not None and found is not None and num_classes < found:
        raise ValueError(
            f'--num-classes is {num_classes}, but the data have {found} classes: raise it, or leave it out.'
        )


def check_images(datasets: tuple[Any, Any], input_size: tuple[int, ...]) -> None:
    """Loads the first image of each data set, and checks what the model would get.

    Raises:
        ValueError: If it cannot be loaded or does not have the channels of the model.
    """
    for dataset, split in zip(datasets, ('training', 'validation')):
        if not hasattr(dataset, '__getitem__') or isinstance(dataset, torch.utils.data.IterableDataset):
            continue
        with explaining(f'The first {split} image cannot be prepared'):
            image = dataset[0][0]
        if len(image) != input_size[0]:
            raise ValueError(
                f'The {split} images have {len(image)} channels and the model {input_size[0]}: give --in-chans '
                f'{len(image)}, or --input-img-mode {COLOR_MODES.get(input_size[0], "")}.'
            )


@torch.no_grad()
def check_model(model: torch.nn.Module, input_size: tuple[int, ...], device: torch.device) -> None:
    """Passes one empty image through a model.

    Raises:
        ValueError: If it does not take images of this size.
    """
    size = ' x '.join(str(length) for length in input_size)
    with explaining(f'The model does not take images of {size}, --input-size or --img-size'):
        model.eval()(torch.zeros(1, *input_size, device=device))


def check_layout(model: torch.nn.Module, input_size: tuple[int, ...], device: torch.device) -> None:
    """Checks that a model can be trained in channels_last.

    On CPUs torch 2.14 writes past its memory in the backward pass of a strided 1x1 convolution of 2 to 15 channels, the
    stem of many multi-branch networks, on images of more than 64 px.

    Raises:
        ValueError: If it cannot; names the convolution.
    """
    if device.type != 'cpu' or max(input_size[1:]) <= 64:
        return
    for name, conv in model.named_modules():
        small = isinstance(conv, torch.nn.Conv2d) and tuple(conv.kernel_size) == (1, 1) and 2 <= conv.in_channels < 16
        if small and max(pair(conv.stride)) > 1:
            raise ValueError(
                f"--channels-last: torch corrupts memory on a CPU as it trains '{name}', a strided 1x1 convolution of "
                f'{conv.in_channels} channels, on images of {max(input_size[1:])} px, expected at most 64. Remove the '
                f'flag, or train on a GPU.'
            )


_CHECKS: tuple[Callable[[argparse.Namespace], None], ...] = (
    _check_search,
    _check_device,
    _check_paths,
    _check_dataset,
    _check_cache,
    _check_channels,
    _check_ranges,
    _check_mixup,
    _check_augmentation,
    _check_model,
    _check_optimizer,
    _check_schedule,
    _check_compile,
    _check_loggers,
)
