"""Where trained weights come from: the package first, then the Hub.

timm's own repositories hold weights of the multi-branch originals. They are merged on load.
"""

import json
import os
from contextlib import suppress
from typing import Any

from timm.models import resolve_pretrained_cfg
from timm.models._pretrained import PretrainedCfg
from timm.models._registry import get_arch_pretrained_cfgs

from ..architectures import ARCHITECTURES
from ..cards.hub import HUB_PREFIX, HubFileNotFoundError, download, parse_hub_source
from ..cards.text import WEIGHTS_FILE
from ..names import ModelName
from ..resources import shipped_repositories

__all__ = ['choose_weights', 'fetch', 'original_cfgs', 'tagged_cfgs']

# Owner of the repositories `<model>.<tag>` on the Hub. Empty: nothing is published there, so no tag names the Hub.
HUB_NAMESPACE = os.environ.get('REPOPT_TIMM_HUB_NAMESPACE', '')

# Weights that their authors publish in a format of their own, for everyone to convert.
_CONVERTIBLE = ('repopt_vgg_b1', 'repopt_vgg_b2', 'repopt_vgg_l1', 'repopt_vgg_l2')
_CONVERTIBLE_TAG = 'in1k'

_TOTAL_STRIDE = 32


def tagged_cfgs() -> dict[str, dict[str, Any]]:
    """Makes timm's configurations of all tags: `<model>.<tag>` to what differs from an untrained model's."""
    cfgs: dict[str, dict[str, Any]] = {f'{name}.{_CONVERTIBLE_TAG}': {} for name in _CONVERTIBLE}
    for name, folder in shipped_repositories().items():
        weights = folder / 'model.safetensors'
        if weights.is_file():
            config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
            cfg = {**config['pretrained_cfg'], 'num_classes': config['num_classes'], 'file': str(weights)}
            cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}
            cfgs[name] = {**cfg, 'pool_size': tuple(max(1, size // _TOTAL_STRIDE) for size in cfg['input_size'][1:])}
    for name, cfg in cfgs.items():
        cfg.pop('tag', None)
        if HUB_NAMESPACE and 'file' not in cfg:
            cfg['hf_hub_id'] = f'{HUB_NAMESPACE}/{name}'
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


def fetch(cfg: PretrainedCfg, cache_dir: str | os.PathLike | None = None) -> str:
    """Brings timm's weights into the cache, from where timm loads them, and says what is wrong if that fails.

    Args:
        cfg: timm's configuration of the weights.
        cache_dir: Defaults to the client's cache.

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


def choose_weights(variant: str, pretrained: bool, cfg: Any, overlay: dict[str, Any] | None) -> Any:
    """Chooses the weights of `pretrained=True`: the named ones, else shipped ones, else the first on the Hub.

    Args:
        variant: Name of the model.
        pretrained: Whether weights are asked for.
        cfg: timm's `pretrained_cfg` argument: a tag, a configuration or nothing.
        overlay: timm's `pretrained_cfg_overlay` argument.

    Returns:
        A `pretrained_cfg` argument for timm.

    Raises:
        ValueError: If there are no such weights; says how to get some.
    """
    resolved = resolve_pretrained_cfg(variant, cfg, overlay)
    if not pretrained or resolved.has_weights or resolved.state_dict:
        return cfg
    available = {name: found for name, found in get_arch_pretrained_cfgs(variant).items() if found.has_weights}
    if not resolved.tag and available:
        return min(available.values(), key=lambda each: not each.file).tag
    if resolved.tag == _CONVERTIBLE_TAG:
        raise ValueError(
            f"The weights '{variant}.{resolved.tag}' are published by the method's authors as a file of their own. Get "
            f'RepOpt-VGG-{variant[-2:].upper()}*.pth from https://github.com/DingXiaoH/RepOptimizers, then convert it: '
            f'`repopt-timm convert-checkpoint FILE --out DIR`, and load it as local-dir:DIR (or publish it with --push '
            f'USER/{variant}.{resolved.tag} and set REPOPT_TIMM_HUB_NAMESPACE=USER).'
        )
    name = f'{variant}.{resolved.tag}' if resolved.tag else variant
    raise ValueError(
        f"There are no trained weights '{name}' here. Available: {', '.join(available) or 'none'}. Train some with "
        f"train.py, or name a repository with 'hf-hub:user/repo'."
    )
