"""Models with their scales as repositories in timm's format: local folders, and the Hugging Face Hub."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import nn

from .cards.card import METRICS, checked_license, encode_scales, eval_results
from .cards.hub import push_folder
from .cards.repository import CONFIG_FILE, check_folder, draw, save_folder, write_card
from .cards.text import CURVES_FILE, WEIGHTS_FILE
from .checkpoint_model import model_from_checkpoint
from .checkpoints.packing import pack
from .checkpoints.read import check_weights, read_checkpoint
from .errors import explaining
from .model_size import size_of
from .models import RepOptVgg
from .models.records import stated_arguments
from .plot import plot_curves
from .reparam import carried_scales, is_sharded, kind_of, uncompiled_name, unwrap
from .scales import Scales
from .sources import ScalesSource, load_scales
from .trained_scales import arguments_of
from .weights_origin import merged_from, origin_of


def save_pretrained(
    model: nn.Module | str | os.PathLike,
    directory: str | os.PathLike,
    scales: ScalesSource | None = None,
    metrics: Mapping[str, float | str] | None = None,
    training: Mapping[str, Any] | None = None,
    precision: str = 'float32',
    repo_id: str | None = None,
    scales_file: bool = False,
    license: str | None = None,
) -> None:
    """Writes a model as a repository in timm's format, whose card holds the scales.

    `timm.create_model('local-dir:<directory>', pretrained=True)` loads it. Each file appears whole or not at all. An
    existing card keeps its other metadata, and the text outside the marks.

    Args:
        model: A whole timm model, compiled or wrapped for parallel training or not, or a run's checkpoint or folder.
        directory: Where to.
        scales: The scales that it was trained with. Defaults to what the model carries.
        metrics: Results as the Hub shows them, such as `{'dataset': 'cifar10', 'top1': 93.1}`, in percent.
            Defaults to those of the checkpoint, unless `precision` is `int8`.
        training: How the weights were trained, plain data for the card. Defaults to what the checkpoint states.
        precision: `float32`, or `float16` or `int8` for smaller kernels, see `packing.pack`; loading restores them.
        repo_id: Name that the repository has on the Hub, for the snippets in the card.
        scales_file: Put the scales into `scales.safetensors` beside the card.
        license: Identifier of the weights' licence, such as `mit`, for a card that states none. Defaults to the
            licence of the weights that they were trained from, as far as known; without one the card states none.

    Raises:
        FileNotFoundError: If there is no such checkpoint or source of scales.
        ValueError: If the checkpoint does not name its model, the model is made of features only, the scales are
            missing or another model's, a weight is sharded, a weight or result is not finite, or the licence is not an
            identifier.
    """
    check_folder(directory, *(() if isinstance(model, nn.Module) else (model,)))
    write = _prepare(model, scales, metrics, training, precision, license)
    save_folder(directory, write, repo_id, scales_file)


def push_to_hub(
    model: nn.Module | str | os.PathLike,
    repo_id: str,
    commit_message: str = 'Model with scales of repopt-timm',
    scales_file: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    **contents: Any,
) -> str:
    """Publishes a model on the Hugging Face Hub, in timm's format, with its scales in the card.

    Args:
        model: See `save_pretrained`.
        repo_id: Name of the repository, `user/repo`, made if there is none.
        commit_message: Title of the commit.
        scales_file: Put the scales into `scales.safetensors`, as is done when the Hub refuses the card as too large.
        private: Whether a new repository is private.
        revision: Branch to commit to, made if there is none.
        create_pr: Open a pull request instead of changing the branch.
        token: Defaults to the token of `hf auth login`.
        contents: `scales`, `metrics`, `training`, `precision` and `license`, see `save_pretrained`.

    Returns:
        Address of the commit or pull request.

    Raises:
        HubError: If the repository cannot be written to.
        FileNotFoundError: See `save_pretrained`, as for ValueError.
    """
    write = _prepare(model, **contents)
    return push_folder(repo_id, write, commit_message, scales_file, private, revision, create_pr, token)


def _prepare(
    model: Any,
    scales: ScalesSource | None = None,
    metrics: Mapping[str, float | str] | None = None,
    training: Mapping[str, Any] | None = None,
    precision: str = 'float32',
    license: str | None = None,
) -> Callable[..., None]:
    """Checks everything, and returns a function that writes the files; see `write_card`."""
    license_name = checked_license(license)
    history: list[Mapping[str, Any]] = []
    known: dict[str, Any] = {}
    facts, source = dict(training or {}), ''
    if isinstance(model, nn.Module):
        model = unwrap(model)
    else:
        source, checkpoint = os.fspath(model), read_checkpoint(model)
        with explaining(f"'{source}' does not hold the model of a run"):
            model = model_from_checkpoint(source, scales, checkpoint=checkpoint)
            known = _training_of(checkpoint)
            facts = dict(known) if training is None else facts
            history = checkpoint.get('history') or []
            last = history[-1] if history else {}
            measured = {key: round(last[f'eval_{key}'], 3) for key in METRICS if last.get(f'eval_{key}') is not None}
        if precision == 'int8':
            # Rounded weights have other accuracies.
            facts |= {f'{key}_before_rounding': value for key, value in measured.items()}
        elif metrics is None:
            metrics = measured
    name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    if name is None or not hasattr(model, 'num_classes'):
        raise ValueError(f'{type(model).__name__} is not a whole model that timm.create_model made.')
    if precision == 'int8' and not isinstance(model, RepOptVgg):
        raise ValueError(f"{name} cannot load 8-bit weights, RepOpt-VGG alone restores them: use 'float16'.")
    weights = {uncompiled_name(key): tensor.detach() for key, tensor in model.state_dict().items()}
    if sharded := [key for key, tensor in weights.items() if is_sharded(tensor)]:
        raise ValueError(
            f"{source or name}: '{sharded[0]}' is sharded: no process has all of it. Gather with get_model_state_dict "
            f'of torch.distributed.checkpoint.state_dict and full_state_dict=True, and publish an unsharded model.'
        )
    check_weights(weights, source or name)
    # safetensors refuses tensors that share memory, as tied ones do.
    packed = pack({key: each.clone(memory_format=torch.contiguous_format) for key, each in weights.items()}, precision)
    found = Scales.from_model(model) if kind_of(model) != 'target' or carried_scales(model) else None
    if scales is not None:
        given = load_scales(scales, model)
        if found not in (None, given):
            raise ValueError(
                f'The model was trained with other scales than {given.title}: {found}. Without scales=... it is '
                f'published with its own.'
            )
        found = given
    if original := merged_from(model):
        further = '; then trained as stated here' if facts else ''
        facts.setdefault('trained_with', f'branches, as {original}; merged into plain kernels{further}')
    if metrics and (dataset := facts.get('dataset') or known.get('dataset')):
        metrics = {'dataset': dataset, **metrics}
    if precision != 'float32':
        facts['weights'] = precision
    facts |= size_of(model)
    if found is not None:
        # What no card can hold is an error before anything is written or uploaded.
        encode_scales(found, facts)
    card = partial(
        write_card,
        model_name=name,
        scales=found,
        license_name=license_name,
        training=facts,
        results=eval_results(metrics) if metrics else [],
        weights_license=origin_of(model).get('license', ''),
    )

    def write(folder: Path, *options: Any) -> None:
        save_file(packed, folder / WEIGHTS_FILE, {'format': 'pt'})
        config_file: Any = folder / CONFIG_FILE  # timm before 1.0.31 opens it as a path
        save_config_for_hf(model, config_file, model_args=stated_arguments(model))
        if rows := [row for row in history if 'train_loss' in row]:
            draw(plot_curves, {name: rows}, folder / CURVES_FILE)
        card(folder, *options)

    return write


def _training_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    args = arguments_of(checkpoint)
    # Not a path of the machine that it was trained on.
    data = args.get('dataset') or Path(args.get('data_dir') or args.get('data') or '').name
    stated = ('epochs', 'opt', 'lr', 'weight_decay', 'clip_grad', 'smoothing', 'mixup', 'cutmix')
    known = {key: args[key] for key in stated if isinstance(args.get(key), int | float | str) and args[key]}
    if 'batch_size' in args:
        known['batch_size'] = args['batch_size'] * args.get('world_size', 1) * args.get('grad_accum_steps', 1)
    if isinstance(checkpoint.get('epoch'), int):
        known['epochs'] = checkpoint['epoch'] + 1
    facts = {'dataset': data, **known, 'seed': args.get('seed'), 'versions': checkpoint.get('versions')}
    return {key: value for key, value in facts.items() if value not in (None, '')}
