"""Where the weights and scales of `timm.create_model(name, pretrained=True)` come from.

The package's own weights come first, then the Hub's. timm's repositories hold weights of the multi-branch originals.
"""

import json
from contextlib import suppress
from typing import Any

from timm.models import adapt_input_conv, resolve_pretrained_cfg
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from timm.models._pretrained import PretrainedCfg
from timm.models._registry import get_arch_pretrained_cfgs
from torch import Tensor

from ..architectures import ARCHITECTURES
from ..cards.hub import HUB_PREFIX, HubFileNotFoundError, download, parse_hub_source
from ..cards.text import WEIGHTS_FILE
from ..checkpoints.packing import unpack
from ..names import ModelName
from ..reparam import kind_of
from ..sources import ScalesSource, scales_beside_weights, shipped_repositories


def shipped_cfgs() -> dict[str, dict[str, Any]]:
    """Makes timm's configurations of the weights that ship, by `<model>.<tag>`."""
    cfgs = {}
    for name, folder in shipped_repositories().items():
        weights = folder / WEIGHTS_FILE
        if weights.is_file():
            cfg = json.loads((folder / 'config.json').read_text(encoding='utf-8'))['pretrained_cfg']
            cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}
            cfgs[name] = {**cfg, 'file': str(weights)}
    return cfgs


def original_cfgs(kind: str) -> dict[str, dict[str, Any]]:
    """Makes the configurations of timm's RepVGG weights for our targets or `branches`: `repopt_vgg_b1.rvgg_in1k`."""
    cfgs: dict[str, dict[str, Any]] = {}
    # timm's RepVGG-D2se has its squeeze-and-excitation in another place than ours.
    for name in (name for name, each in ARCHITECTURES.items() if kind == 'branches' or not each.use_se):
        for cfg in get_arch_pretrained_cfgs(name.replace('repopt_vgg', 'repvgg')).values():
            if cfg.has_weights:
                own = {key: value for key, value in cfg.to_dict().items() if key not in ('architecture', 'tag')}
                if kind == 'target':
                    own.pop('first_conv')
                cfgs[f'{ModelName(name, kind).variant}.{cfg.tag}'] = own
    return cfgs


def choose_weights(variant: str, pretrained: bool, cfg: Any, overlay: dict[str, Any] | None) -> PretrainedCfg:
    """Chooses the weights of `pretrained=True`: the named ones, else shipped ones, else the first on the Hub."""
    resolved = resolve_pretrained_cfg(variant, cfg, overlay)
    if not pretrained or resolved.has_weights or resolved.state_dict:
        return resolved
    available = {name: found for name, found in get_arch_pretrained_cfgs(variant).items() if found.has_weights}
    if resolved.tag or not available:
        name = f'{variant}.{resolved.tag}' if resolved.tag else variant
        raise ValueError(
            f"There are no trained weights '{name}' here. Available: {', '.join(available) or 'none'}. Train some with "
            f"train.py, or name a repository with 'hf-hub:user/repo'."
        )
    return resolve_pretrained_cfg(variant, min(available.values(), key=lambda each: not each.file).tag, overlay)


def load_config(source: str | None, place: Any) -> tuple[Any, str, dict[str, Any]]:
    """Loads the `config.json` of a repository or folder: configuration, name of the model, and its arguments."""
    load: Any = load_model_config_from_hf if source == 'hf-hub' else load_model_config_from_path
    return load(place)


def requested_scales(
    name: ModelName, config: PretrainedCfg, scales: ScalesSource | None, beside: bool
) -> ScalesSource | None:
    """Returns the scales that a call of `timm.create_model` means: those named, else those beside the weights."""
    repository = config.source in ('hf-hub', 'local-dir')
    place = config.file if config.source == 'local-dir' else config.hf_hub_id
    # Scales that a downloaded config.json brings could name any file or repository, and do not count.
    if scales is not None and repository and load_config(config.source, place)[2].get('scales') == scales:
        scales = None
    if scales is None and (beside or repository):
        scales = scales_beside_weights(config.to_dict())
    if scales is not None and name.kind == 'branches':
        raise ValueError(
            f'{name.variant} does not take scales: it has branches, which an ordinary optimizer trains (--opt sgd). '
            f'{name.architecture} is the plain network that takes them.'
        )
    return scales


def fetch(cfg: PretrainedCfg, cache_dir: Any = None) -> str:
    """Downloads timm's weights, with errors that name the repository, and returns its name; empty if not on the Hub."""
    if not cfg.hf_hub_id or cfg.file or cfg.state_dict:
        return ''
    source = parse_hub_source(HUB_PREFIX + cfg.hf_hub_id)
    # timm looks for another file if there is none of this name.
    with suppress(HubFileNotFoundError):
        download(source.repo_id, cfg.hf_hub_filename or WEIGHTS_FILE, source.revision, cache_dir)
    return source.repo_id


def restore(state_dict: dict[str, Tensor], model: Any, first_conv: str = '') -> dict[str, Tensor]:
    """Unpacks a file's weights, and adapts the operators of a twin's first convolution to other image channels."""
    state_dict = unpack(state_dict)
    # timm adapts `<first_conv>.weight` of targets. In some twins the first convolution has no branches.
    plain = f'{first_conv}.weight' if kind_of(model) != 'target' else None
    for key, tensor in state_dict.items():
        if (key == plain or key.startswith(f'{first_conv}.parametrizations.weight.')) and tensor.ndim == 4:
            channels = model.get_submodule(first_conv).in_channels
            # timm before 1.0.31 adapts weights of three channels only.
            base = {} if tensor.shape[1] == 3 else {'base_chans': tensor.shape[1]}
            if tensor.shape[1] != channels:
                state_dict[key] = adapt_input_conv(channels, tensor, **base)
    return state_dict
