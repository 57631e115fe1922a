"""Checkpoints of a run, one per epoch, in the format of timm's training script.

The numbers of epochs in their names and in them are timm's, from 0; `summary.csv` and `times.csv` count from 1.
"""

import argparse
import io
import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.utils import get_state_dict, unwrap_model
from timm.utils.misc import natural_key

from ..checkpoints.read import BEST_CHECKPOINT, LAST_CHECKPOINT, read_checkpoint
from ..errors import explaining, reason_of
from ..files import replacing
from ..reparam import carried_scales, kind_of
from ..reporting import package_versions
from ..scales import Scales
from ..scales.scale_files import CHECKPOINT_KEY, checkpoint_entry
from ..sources import IMPLIED
from ..trained_scales import IMPLIED_KEY, arguments_of
from ..weights_origin import origin_of
from .engine import TrainState, ranked
from .parsing import ARGUMENTS
from .run_folder import ARGUMENTS_FILE, SUMMARY_FILE, TIMES_FILE, write_epochs

_logger = logging.getLogger(__name__)

# Arguments that do not change what is trained from here on.
_FREE = {
    *('val_split', 'val_num_samples', 'cache_images', 'dataset_download', 'scales', 'init', 'pretrained'),
    *('initial_checkpoint', 'resume', 'override', 'crop_pct', 'interpolation', 'validation_batch_size'),
    *('channels_last', 'grad_checkpointing', 'torchcompile', 'device', 'epochs', 'cooldown_epochs', 'patience'),
    *('log_interval', 'val_interval', 'checkpoint_hist', 'workers', 'pin_mem', 'output', 'experiment'),
    *('log_tensorboard', 'log_wandb', 'debug', 'search_first'),
}


def save(folder: Path, state: TrainState, args: argparse.Namespace) -> None:
    """Writes `last.pth.tar`, and keeps the best under `checkpoint-<epoch>` and `model_best`; an error keeps the old."""
    # A file that torch writes itself loses the cause of an error.
    buffer = io.BytesIO()
    torch.save(_content(state, args), buffer)
    with replacing(folder / LAST_CHECKPOINT) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        # If the process is killed before the renaming, the resumed run repeats this epoch and these files.
        _write_others(folder, temporary, state, args)


def _content(state: TrainState, args: argparse.Namespace) -> dict[str, Any]:
    model: Any = unwrap_model(state.model)
    content = {
        'epoch': state.history[-1]['epoch'],
        # Not --model, which may name a tag or a repository.
        'arch': model.pretrained_cfg['architecture'],
        'state_dict': get_state_dict(state.model, unwrap_model),
        'optimizer': state.optimizer.state_dict(),
        'version': 2,
        'args': argparse.Namespace(**vars(args), overridden=state.overridden),
        'label_names': model.pretrained_cfg.get('label_names'),
        'origin': origin_of(model),
        'versions': versions(),
        'scales_fingerprint': _fingerprint(model),
        'metric': state.history[-1].get('eval_top1'),
        'history': state.history,
        'times': state.times,
    }
    if kind_of(model) != 'target':
        content[CHECKPOINT_KEY] = checkpoint_entry(Scales.from_model(model))
    elif args.scales == IMPLIED:
        # No name leads to them once the branches are merged.
        scales = Scales.from_model(model)
        modules = {name: dict(vectors) for name, vectors in scales.items()}
        content[IMPLIED_KEY] = {'modules': modules, 'counts': scales.counts, 'provenance': scales.provenance}
    if state.ema is not None:
        content['state_dict_ema'] = get_state_dict(state.ema, unwrap_model)
    if state.scaler.is_enabled():
        content['amp_scaler'] = state.scaler.state_dict()
    return content


def _fingerprint(model: Any) -> str | None:
    """Returns the fingerprint of the scales that a model trains with; None without, and for a search."""
    kind = kind_of(model)
    if kind == 'hs' or (kind == 'target' and not carried_scales(model)):
        return None
    scales = Scales.from_model(model)
    if kind == 'csla':
        # Its identities are trained.
        constant = {name: {b: vector for b, vector in scales[name].items() if b != 'identity'} for name in scales}
        scales = Scales(scales.architecture, constant, scales.geometry, start=scales.start)
    return scales.fingerprint


def versions() -> dict[str, str]:
    """Returns the versions of the packages that a training depends on."""
    return package_versions(torch, torchvision, timm)


def _write_others(folder: Path, last: Path, state: TrainState, args: argparse.Namespace) -> None:
    """Makes the other files of the folder what the history says, with `last` as the newest checkpoint."""
    newest, *best = (
        folder / f'checkpoint-{row["epoch"]}.pth.tar' for row in (state.history[-1], *ranked(state.history))
    )
    kept = [path for path in best if path == newest or path.exists()][: args.checkpoint_hist]
    if newest in kept:
        _duplicate(last, newest)
    if kept:
        _duplicate(kept[0], folder / BEST_CHECKPOINT)
    else:
        (folder / BEST_CHECKPOINT).unlink(missing_ok=True)
    write_epochs(folder / SUMMARY_FILE, state.history)
    write_epochs(folder / TIMES_FILE, state.times)
    for path in set(folder.glob('checkpoint-*.pth.tar')).difference(kept):
        path.unlink(missing_ok=True)


def _duplicate(source: Path, target: Path) -> None:
    if target.exists() and target.samefile(source):
        return
    with replacing(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def resume(folder: Path, state: TrainState, args: argparse.Namespace) -> None:
    """Brings the state, and the files of the folder, to where the run stopped, if there is a checkpoint."""
    found = _find(folder, args.resume, args.override) if args.resume else None
    if args.distributed:
        epochs: list[Any] = [0] * args.world_size
        torch.distributed.all_gather_object(epochs, len(found[1]['history']) if found else 0)
        if len(set(epochs)) > 1:
            raise ValueError(
                f"The processes would go on after different epochs: {', '.join(map(str, epochs))}, by rank. '{folder}' "
                f'has to be on a disk that all nodes share.'
            )
    if found is None:
        if args.resume:
            _logger.warning(f"'{folder}' has no checkpoint yet: the run starts with its first epoch.")
        return
    path, checkpoint = found
    saved, new = arguments_of(checkpoint), vars(args)
    # A tuple is a list in the args.yaml of the run.
    before, after = (
        json.loads(json.dumps({**values, 'data_dir': os.path.abspath(values.get('data_dir') or '')}, default=str))
        for values in (saved, new)
    )
    # An argument that the checkpoint lacks was added to the command after it was written.
    changed = [
        name
        for name in (*ARGUMENTS, 'world_size')
        if name in saved and name not in _FREE and before[name] != after[name]
    ]
    changes = ', '.join(f'{name} {saved[name]!r} -> {new[name]!r}' for name in changed)
    ours = _fingerprint(unwrap_model(state.model))
    theirs = checkpoint.get('scales_fingerprint', ours)
    if theirs != ours:
        raise ValueError(
            f"'{path}' was saved with the scales {(theirs or 'none')[:12]}, not {(ours or 'none')[:12]}. Resume with "
            f'the --scales of the run, or start a new one. Other differences: {changes or "none"}.'
        )
    # One optimizer cannot continue from another's state.
    if changed and not (args.override and 'opt' not in changed):
        raise ValueError(
            f"'{path}' was saved with other arguments: {changes}. Resume with the saved ones, {ARGUMENTS_FILE} beside "
            f'it, or add --override to continue with the new ones; --opt cannot change.'
        )
    names = unwrap_model(state.model).pretrained_cfg.get('label_names')
    if checkpoint.get('label_names', names) != names:
        raise ValueError(
            f"'{path}' was trained on other classes, or on the same ones in another order. Resume with the data of the "
            f'run, or number them as it did: --class-map FILE --override.'
        )
    groups = state.optimizer.param_groups
    wanted = [{name: value for name, value in group.items() if name != 'params'} for group in groups]
    try:
        unwrap_model(state.model).load_state_dict(checkpoint['state_dict'])
        state.optimizer.load_state_dict(checkpoint['optimizer'])
        if state.ema is not None:
            # An average that --override adds starts from the weights.
            average = checkpoint.get('state_dict_ema', checkpoint['state_dict'])
            unwrap_model(state.ema).load_state_dict(average)
        if 'amp_scaler' in checkpoint:
            state.scaler.load_state_dict(checkpoint['amp_scaler'])
    except Exception as error:
        raise ValueError(
            f"'{path}' does not hold the state of this run ({reason_of(error)}): resume with the arguments of that "
            f'run, or start a new one with --initial-checkpoint.'
        ) from None
    if args.override:
        for group, values in zip(state.optimizer.param_groups, wanted):
            group.update(values)
    state.history, state.times = checkpoint['history'], checkpoint.get('times', [])
    state.overridden = list(saved.get('overridden', []))
    if changed:
        state.overridden.append(f'after epoch {len(state.history)}: {changes}')
        _logger.warning(f'The run goes on with other arguments {state.overridden[-1]}.')
    if (before := saved.get('total_epochs', saved.get('epochs'))) != args.total_epochs:
        _logger.warning(f'The schedule is now that of {args.total_epochs} epochs, not of {before}.')
    _logger.info(f'Resuming {path} after epoch {len(state.history)}.')
    if args.rank == 0:
        _duplicate(path, folder / LAST_CHECKPOINT)
        _write_others(folder, folder / LAST_CHECKPOINT, state, args)


def _find(folder: Path, resume: str, override: bool) -> tuple[Path, dict[str, Any]] | None:
    """Reads the checkpoint that a run goes on from: a file, or with `auto` the folder's newest that can be read."""
    last = folder / LAST_CHECKPOINT
    if resume != 'auto':
        checkpoint = _read(Path(resume))
        done = newest = len(checkpoint['history'])
        with suppress(FileNotFoundError, ValueError):
            newest = len(_read(last)['history'])
        if newest > done and not override:
            raise ValueError(
                f"'{resume}' is of epoch {done}, and the run went on to epoch {newest}. Continue it with --resume "
                f"'{last}', go back and lose these epochs with --override, or copy the file into another folder."
            )
        return Path(resume), checkpoint
    numbered = sorted(folder.glob('checkpoint-*.pth.tar'), key=lambda path: natural_key(path.name), reverse=True)
    damaged = None
    for path in filter(Path.exists, (last, *numbered, folder / BEST_CHECKPOINT)):
        try:
            return path, _read(path)
        except ValueError as error:
            damaged = error
            _logger.warning(error)
    if damaged:
        raise damaged
    return None


def _read(path: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    history: Any = checkpoint.get('history')
    with explaining(f"'{path}' is not the checkpoint of a run; start from its weights with --initial-checkpoint"):
        if not history or [row['epoch'] for row in history] != list(range(len(history))):
            raise TypeError('it has no history of its epochs')
    return checkpoint
