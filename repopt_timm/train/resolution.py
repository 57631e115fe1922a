"""What a run is: the arguments of the user, with what depends on model, machine and folder filled in, once."""

import argparse
import logging
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
from timm.models import parse_model_name, safe_model_name

from ..checkpoints.read import LAST_CHECKPOINT, read_checkpoint
from ..console import did_you_mean
from ..datasets import core_count
from ..errors import explaining
from ..models import resolve_model
from ..names import PREFIX, ModelName
from ..tables import read_mapping
from ..trained_scales import named_scales
from .run_folder import ARGUMENTS_FILE
from .schedule import choose_schedule
from .validation import check_arguments

_logger = logging.getLogger(__name__)


def resolve(args: argparse.Namespace, choose_scales: bool = True) -> argparse.Namespace:
    """Fills in the defaults that depend on the model, on other arguments and on the run that is resumed."""
    run = argparse.Namespace(**vars(args))
    run.variant, saved_args = find_variant(run.model)
    run.opt = run.opt or ('repopt_sgd' if is_target(run.variant) else 'sgd')
    # What a repository's config says of the architecture goes into the checkpoint, which does not name it.
    kept = saved_args.keys() & {'depths', 'widths', 'strides', 'use_se', 'act_layer'}
    run.model_kwargs = {name: saved_args[name] for name in sorted(kept)} | run.model_kwargs
    run.gp = run.gp or saved_args.get('global_pool')
    _place(run)
    before: dict[str, Any] = {}
    if run.resume:
        with suppress(OSError, ValueError):
            before = read_mapping(folder_of(run) / ARGUMENTS_FILE)
    if run.lr is None:
        ratio = run.batch_size * run.world_size * run.grad_accum_steps / run.lr_base_size
        if run.lr_base_scale == 'sqrt' or (not run.lr_base_scale and any(name in run.opt for name in ('ada', 'lamb'))):
            ratio **= 0.5
        run.lr = run.lr_base * ratio
    asked = before.get('warmup_epochs') if run.warmup_epochs is None else run.warmup_epochs
    run.warmup_epochs, on_updates = choose_schedule(run.epochs, run.sched, asked, run.sched_on_updates)
    run.sched_on_updates = run.sched_on_updates or before.get('sched_on_updates', on_updates)
    # torch warns of more than cores, and they are slower. What a worker decodes is lost with it after each epoch.
    run.workers = 0 if run.cache_images else min(run.workers, core_count())
    check_arguments(run)
    if run.warmup_epochs >= run.epochs and run.sched != 'none':
        _logger.warning(
            f'--warmup-epochs is {run.warmup_epochs:g} and --epochs {run.epochs}, so that the learning rate never '
            f'reaches {run.lr:g}: lower --warmup-epochs.'
        )
    if choose_scales:
        run.scales = _scales(run, before)
    return run


def find_variant(model_name: str) -> tuple[str, dict[str, Any]]:
    """Returns the name in timm's registry, without a tag, and the arguments that a repository keeps for its model."""
    with explaining(f'--model {model_name} has no config.json that timm can read'):
        name, saved_args = resolve_model(model_name)
    variant = name.split('.')[0]
    if not timm.is_model(variant):
        raise ValueError(f"--model: timm knows no '{variant}'.{did_you_mean(variant, timm.list_models())}")
    return variant, saved_args


def is_target(variant: str) -> bool:
    """Returns whether a registered name is that of a plain model of this package."""
    name = ModelName.parse(variant)
    return name.kind == 'target' and PREFIX in name.architecture


def folder_of(args: argparse.Namespace) -> Path:
    """Returns the folder of a run."""
    return Path(args.output) / args.experiment


def _place(run: argparse.Namespace) -> None:
    """Makes `output` and `experiment` name the folder of the run."""
    if run.resume not in (None, 'auto'):
        folder = Path(run.resume).absolute().parent
        run.output, run.experiment = str(folder.parent), folder.name
    elif run.resume and not run.experiment:
        raise ValueError('--resume without a file needs --experiment, to know which run in --output to continue.')
    else:
        run.experiment = run.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(run.model)}'
        if not run.resume and (folder_of(run) / LAST_CHECKPOINT).exists():
            raise ValueError(
                f"There is a run in '{folder_of(run)}' already. Continue it with --resume, or choose another "
                f'--experiment.'
            )


def _scales(run: argparse.Namespace, before: dict[str, Any]) -> str | None:
    """Chooses the scales of a target that was given none: where its weights come from, or the unsearched values."""
    multiplies = is_target(run.variant) and 'repopt' in run.opt
    if run.scales or not (multiplies or ModelName.parse(run.variant).kind == 'csla'):
        return run.scales
    if before or not multiplies:
        return before.get('scales')
    if run.initial_checkpoint:
        with explaining(f"'{run.initial_checkpoint}' does not hold weights"):
            scales = named_scales(read_checkpoint(run.initial_checkpoint), run.initial_checkpoint)
    elif not run.pretrained and '.' not in run.model and parse_model_name(run.model)[0] is None:
        scales = 'initial'
    else:
        return None
    _logger.info(f'Without --scales this run uses --scales {scales}.')
    return scales
