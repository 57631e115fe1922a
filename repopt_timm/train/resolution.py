"""What a run is: the arguments of the user, with what depends on model, machine and folder filled in, once."""

import argparse
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import yaml
from timm.models import parse_model_name, safe_model_name

from ..checkpoints.read import read_checkpoint
from ..console import did_you_mean
from ..datasets import core_count
from ..errors import explaining
from ..models import resolve_model
from ..names import PREFIX, ModelName
from ..trained_scales import named_scales
from .run_folder import ARGUMENTS_FILE, LAST_CHECKPOINT
from .schedule import choose_schedule
from .validation import check_arguments

__all__ = ['RunArguments', 'find_variant', 'folder_of', 'is_target', 'resolve']

_logger = logging.getLogger(__name__)

_ARCHITECTURE_ARGS = ('depths', 'widths', 'strides', 'use_se', 'act_layer')


class RunArguments(argparse.Namespace):
    """Arguments of a run, to which nobody writes any more."""

    def __init__(self, **values: Any):
        vars(self).update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f'{name} cannot be set: the arguments of a run are fixed.')


def resolve(args: argparse.Namespace, choose_scales: bool = True) -> RunArguments:
    """Replaces defaults that depend on the model, on other arguments, and on the run that is resumed.

    Args:
        args: What `parse_arguments` returned, after `prepare_device`.
        choose_scales: Choose scales for a target that was given none.

    Raises:
        ValueError: If arguments do not go together.
        FileNotFoundError: If a file that they name does not exist.
    """
    run = argparse.Namespace(**vars(args))
    run.variant, saved_args = find_variant(run.model)
    run.opt = run.opt or ('repopt_sgd' if is_target(run.variant) else 'sgd')
    # What a repository's config says of the architecture goes into the checkpoint, which does not name it.
    run.model_kwargs = {name: saved_args[name] for name in _ARCHITECTURE_ARGS if name in saved_args} | run.model_kwargs
    run.gp = run.gp or saved_args.get('global_pool')
    run.output, run.experiment = _place(run)
    before = _arguments_before(folder_of(run)) if run.resume else {}
    if run.lr is None:
        ratio = run.batch_size * run.world_size * run.grad_accum_steps / run.lr_base_size
        if run.lr_base_scale == 'sqrt' or (not run.lr_base_scale and any(name in run.opt for name in ('ada', 'lamb'))):
            ratio **= 0.5
        run.lr = run.lr_base * ratio
    asked = before.get('warmup_epochs') if run.warmup_epochs is None else run.warmup_epochs
    run.warmup_epochs, on_updates = choose_schedule(run.epochs, run.sched, asked, run.sched_on_updates)
    run.sched_on_updates = run.sched_on_updates or before.get('sched_on_updates', on_updates)
    # torch warns of more, and they are slower.
    run.workers = min(run.workers, core_count())
    check_arguments(run)
    if run.warmup_epochs >= run.epochs and run.sched != 'none' and run.rank == 0:
        _logger.warning(
            f'--warmup-epochs is {run.warmup_epochs:g} and --epochs {run.epochs}, so that the learning rate never '
            f'reaches {run.lr:g}: lower --warmup-epochs.'
        )
    if choose_scales:
        run.scales = _scales(run, before)
    return RunArguments(**vars(run))


def find_variant(model_name: str) -> tuple[str, dict[str, Any]]:
    """Returns the name in timm's registry, without a tag, and the arguments that a repository keeps for its model."""
    source, name = parse_model_name(model_name)
    if not name:
        raise ValueError(f"--model is '{model_name}', expected the name of a timm model, such as repopt_vgg_a0.")
    if source == 'local-dir' and not Path(name, 'config.json').is_file():
        raise FileNotFoundError(f"--model: '{name}' has no config.json, expected a folder in timm's format.")
    with explaining(f'--model {model_name} has no config.json that timm can read'):
        name, saved_args = resolve_model(model_name)
    variant = name.split('.')[0]
    if not timm.is_model(variant):
        raise ValueError(f"timm knows no model '{variant}'.{did_you_mean(variant, timm.list_models())}")
    return variant, saved_args


def is_target(variant: str) -> bool:
    """Returns whether a registered name is that of a plain model of this package."""
    name = ModelName.parse(variant)
    return name.kind == 'target' and PREFIX in name.architecture


def folder_of(args: argparse.Namespace) -> Path:
    """Returns the folder of a run."""
    return Path(args.output) / args.experiment


def _place(args: argparse.Namespace) -> tuple[str, str]:
    """Returns `output` and `experiment`, which name the folder of the run."""
    if args.resume and args.resume != 'auto':
        folder = Path(args.resume).absolute().parent
        return str(folder.parent), folder.name
    if args.resume and not args.experiment:
        raise ValueError('--resume without a file needs --experiment, to know which run in --output to continue.')
    experiment = args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}'
    folder = Path(args.output) / experiment
    if not args.resume and (folder / LAST_CHECKPOINT).exists():
        raise ValueError(
            f"There is a run in '{folder}' already. Continue it with --resume, or choose another --experiment."
        )
    return args.output, experiment


def _arguments_before(folder: Path) -> dict[str, Any]:
    """Returns what `args.yaml` in a run's folder says; nothing if it cannot be read."""
    try:
        saved = yaml.safe_load((folder / ARGUMENTS_FILE).read_text(encoding='utf-8'))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return saved if isinstance(saved, dict) else {}


def _scales(args: argparse.Namespace, before: dict[str, Any]) -> str | None:
    """Chooses the scales of a target that was given none, and says so.

    A run that is resumed keeps what it had, `--initial-checkpoint` brings what it was trained with, pretrained weights
    what ships with them; anything else starts from the unsearched values.
    """
    multiplies = is_target(args.variant) and 'repopt' in args.opt
    if args.scales or not (multiplies or ModelName.parse(args.variant).kind == 'csla'):
        return args.scales
    if before or not multiplies:
        return before.get('scales')
    if args.initial_checkpoint:
        with explaining(f"'{args.initial_checkpoint}' does not hold weights"):
            scales = named_scales(read_checkpoint(args.initial_checkpoint), args.initial_checkpoint)
    elif not args.pretrained and '.' not in args.model and parse_model_name(args.model)[0] is None:
        scales = 'initial'
    else:
        return None
    if scales and args.rank == 0:
        what = 'the unsearched values, ' if scales == 'initial' else ''
        _logger.info(f'Without --scales this run uses {what}--scales {scales}.')
    return scales
