"""Where the weights and scales of `timm.create_model(name, pretrained=True)` come from, and how branches are merged.

The package's own weights come first, then the Hub's. timm's repositories hold weights of the multi-branch originals.
"""

import json
import os
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
from ..resources import shipped_repositories
from ..sources import ScalesSource, scales_beside_weights

__all__ = ['choose_weights', 'fetch', 'original_cfgs', 'requested_scales', 'restore', 'tagged_cfgs']

# Weights that their authors publish in a format of their own, for everyone to convert.
_CONVERTIBLE = ('repopt_vgg_b1', 'repopt_vgg_b2', 'repopt_vgg_l1', 'repopt_vgg_l2')
_CONVERTIBLE_TAG = 'in1k'

_TOTAL_STRIDE = 32


def tagged_cfgs() -> dict[str, dict[str, Any]]:
    """Makes timm's configurations of all tags: `<model>.<tag>` to what differs from an untrained model's."""
    cfgs: dict[str, dict[str, Any]] = {f'{name}.{_CONVERTIBLE_TAG}': {} for name in _CONVERTIBLE}
    for name, folder in shipped_repositories().items():
        weights = folder / WEIGHTS_FILE
        if weights.is_file():
            config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
            cfg = {**config['pretrained_cfg'], 'num_classes': config['num_classes'], 'file': str(weights)}
            cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}
            cfgs[name] = {**cfg, 'pool_size': tuple(max(1, size // _TOTAL_STRIDE) for size in cfg['input_size'][1:])}
    for cfg in cfgs.values():
        cfg.pop('tag', None)
    return cfgs


def original_cfgs(kind: str) -> dict[str, dict[str, Any]]:
    """Makes the configurations of timm's RepVGG weights for our names: `repopt_vgg_b1.rvgg_in1k`.

    Args:
        kind: `target`, for weights that are merged on load, or `branches`.
    """
    cfgs: dict[str, dict[str, Any]] = {}
    # The squeeze-and-excitation of timm's RepVGG-D2se is elsewhere than ours.
    for name in (name for name, each in ARCHITECTURES.items() if kind == 'branches' or not each.use_se):
        for cfg in get_arch_pretrained_cfgs(name.replace('repopt_vgg', 'repvgg')).values():
            if cfg.has_weights:
                own = {key: value for key, value in cfg.to_dict().items() if key not in ('architecture', 'tag')}
                if kind == 'target':
                    own.pop('first_conv')
                cfgs[f'{ModelName(name, kind).variant}.{cfg.tag}'] = own
    return cfgs


def choose_weights(variant: str, pretrained: bool, cfg: Any, overlay: dict[str, Any] | None) -> PretrainedCfg:
    """Chooses the weights of `pretrained=True`: the named ones, else shipped ones, else the first on the Hub.

    Args:
        variant: Name of the model.
        pretrained: Whether weights are asked for.
        cfg: timm's `pretrained_cfg` argument: a tag, a configuration or nothing.
        overlay: timm's `pretrained_cfg_overlay` argument.

    Raises:
        ValueError: If there are no such weights; says how to get some.
    """
    resolved = resolve_pretrained_cfg(variant, cfg, overlay)
    if not pretrained or resolved.has_weights or resolved.state_dict:
        return resolved
    available = {name: found for name, found in get_arch_pretrained_cfgs(variant).items() if found.has_weights}
    if not resolved.tag and available:
        return resolve_pretrained_cfg(variant, min(available.values(), key=lambda each: not each.file).tag, overlay)
    if resolved.tag == _CONVERTIBLE_TAG:
        raise ValueError(
            f"The weights '{variant}.{resolved.tag}' are published by the method's authors as a file of their own. Get "
            f'RepOpt-VGG-{variant[-2:].upper()}*.pth from https://github.com/DingXiaoH/RepOptimizers, then convert it: '
            f'`repopt-timm convert-checkpoint FILE --out DIR`, and load it as local-dir:DIR.'
        )
    name = f'{variant}.{resolved.tag}' if resolved.tag else variant
    raise ValueError(
        f"There are no trained weights '{name}' here. Available: {', '.join(available) or 'none'}. Train some with "
        f"train.py, or name a repository with 'hf-hub:user/repo'."
    )


def requested_scales(
    name: ModelName, config: PretrainedCfg, scales: ScalesSource | None, beside: bool
) -> ScalesSource | None:
    """Returns the scales that a call of `timm.create_model` means: those named, else those beside the weights.

    Args:
        name: Name of the model.
        config: Configuration of the weights.
        scales: The argument `scales`. One that a downloaded config brings could name any file or repository and does
            not count.
        beside: Whether the weights are those of the model itself, so that scales may lie beside them.

    Raises:
        ValueError: If a multi-branch original is to take scales.
    """
    repository = config.source in ('hf-hub', 'local-dir')
    if scales is not None and repository:
        local = config.source == 'local-dir'
        load: Any = load_model_config_from_path if local else load_model_config_from_hf
        if load(config.file if local else config.hf_hub_id)[2].get('scales') == scales:
            scales = None
    if scales is None and (beside or repository):
        scales = scales_beside_weights(config.to_dict())
    if scales is not None and name.kind == 'branches':
        raise ValueError(
            f'{name.variant} does not take scales: it has branches, which an ordinary optimizer trains (--opt sgd). '
            f'{name.architecture} is the plain network that takes them.'
        )
    return scales


def fetch(cfg: PretrainedCfg, cache_dir: str | os.PathLike | None = None) -> str:
    """Brings timm's weights into the cache, from where timm loads them, and says what is wrong if that fails.

    Returns:
        What to call them: the repository; empty if they are not on the Hub.

    Raises:
        HubError: If they cannot be downloaded, or are not in the cache while the client is offline.
    """
    if not cfg.hf_hub_id or cfg.file or cfg.state_dict:
        return ''
    source = parse_hub_source(HUB_PREFIX + cfg.hf_hub_id)
    # timm looks for another file if there is none of this name.
    with suppress(HubFileNotFoundError):
        download(source.repo_id, cfg.hf_hub_filename or WEIGHTS_FILE, source.revision, cache_dir)
    return source.repo_id


def restore(state_dict: dict[str, Tensor], model: Any, first_conv: str = '') -> dict[str, Tensor]:
    """Makes the tensors of a file those of a model, for timm's `load_pretrained`.

    Packed weights are unpacked. timm adapts `<first_conv>.weight` to other image channels; the operators of a twin's
    first convolution have other names, and are adapted here.
    """
    state_dict = unpack(state_dict)
    # In some twins the first convolution has no branches.
    plain = f'{first_conv}.weight' if kind_of(model) != 'target' else None
    for key, tensor in state_dict.items():
        if (key == plain or key.startswith(f'{first_conv}.parametrizations.weight.')) and tensor.ndim == 4:
            channels = model.get_submodule(first_conv).in_channels
            # timm before 1.0.31 adapts weights of three channels only.
            base = {} if tensor.shape[1] == 3 else {'base_chans': tensor.shape[1]}
            if tensor.shape[1] != channels:
                state_dict[key] = adapt_input_conv(channels, tensor, **base)
    return state_dict
