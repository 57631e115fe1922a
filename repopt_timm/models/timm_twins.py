"""timm's networks by our names: plain target, Hyper-Search, CSLA, and the original with branches where it has some."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import timm
from timm.models import load_pretrained, model_entrypoint, parse_model_name, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from timm.models._pretrained import DefaultCfg, PretrainedCfg
from timm.models._registry import get_arch_pretrained_cfgs
from torch import nn

from ..blocks import PlainBlock, implied_scales, plain_twin
from ..names import KINDS, MULTI_BRANCH, PREFIX, ModelName
from ..reparam import branches_of, multi_branch_blocks, network_name, repvgg_prior
from ..sources import IMPLIED, ScalesSource
from ..weights_origin import forget_origin, note_merged
from .kinds import ModelArgsWithoutScales, make_kind, name_features, refuse_scales, register_kinds, requested_scales
from .pretrained_weights import fetch
from .strided_byobnet import create_byobnet

__all__ = ['ensure_registered', 'plain_first_conv', 'register_multi_branch', 'register_twins', 'resolve_model']

default_cfgs: dict[str, DefaultCfg] = {}
"""timm looks here for the configurations of what this module registers."""

_HUB_SOURCES = ('hf-hub', 'local-dir')


def register_multi_branch() -> None:
    """Registers the twins of timm's multi-branch networks, `names.MULTI_BRANCH`, as far as this timm has them."""
    for pattern in MULTI_BRANCH:
        for name in timm.list_models(pattern):
            _register(name, KINDS)


def register_twins(name: str) -> None:
    """Registers `repopt_<name>`, `repopt_<name>_hs` and `repopt_<name>_csla` of a timm model with timm.

    All of the model's arguments work, and `scales=`. `pretrained=True` of the target takes timm's weights; with scales
    they stay as they are, for fine-tuning. Safe to call again. Those of timm's own multi-branch networks are there
    already: `repopt_mobileone_s0`.

    Args:
        name: Name of a timm model, such as `resnet18`. One with multi-branch blocks is made plain, see `plain_twin`.

    Raises:
        ValueError: If timm does not know the model.

    Example:
        >>> register_twins('resnet18')
        >>> search = timm.create_model('repopt_resnet18_hs', num_classes=10)
    """
    if not timm.is_model(name) or '.' in name:
        raise ValueError(f"timm does not know a model '{name}': name one without a tag, see timm.list_models().")
    if not timm.is_model(PREFIX + name):
        _register(name, ('target', 'hs', 'csla'))


def ensure_registered(model_name: str) -> None:
    """Registers the twins that a name such as `repopt_resnet18_hs` asks for, if timm does not know it yet."""
    name = ModelName.parse(model_name)
    base = name.architecture.removeprefix(PREFIX)
    if base != name.architecture and not timm.is_model(name.variant) and timm.is_model(base):
        register_twins(base)


def resolve_model(model_name: str) -> tuple[str, dict[str, Any]]:
    """Finds out which model a name for `timm.create_model` stands for, and registers it if it is a twin.

    Args:
        model_name: A model's name, `hf-hub:user/repo`, or `local-dir:FOLDER`, whose `config.json` names the model.

    Returns:
        The model's name, which timm need not know, and the arguments that the `config.json` keeps for it.

    Raises:
        OSError: If the `config.json` cannot be read or downloaded.
        ValueError: If the name is not one that timm takes. Over a damaged `config.json` timm raises whatever it meets.
    """
    source, name = parse_model_name(model_name)
    saved_args: dict[str, Any] = {}
    if source == 'hf-hub':
        _, name, saved_args = load_model_config_from_hf(name)
    elif source == 'local-dir':
        _, name, saved_args = load_model_config_from_path(name)
    ensure_registered(name)
    return name, saved_args


def _register(name: str, kinds: Iterable[str]) -> None:
    architecture = PREFIX + name
    cfgs = get_arch_pretrained_cfgs(name)
    untrained = replace(resolve_pretrained_cfg(name), url=None, hf_hub_id=None, file=None, tag='')
    for kind in kinds:
        entry = DefaultCfg()
        for full_name, cfg in cfgs.items() if kind in ('target', 'branches') else ():
            tag = full_name.partition('.')[2]
            entry.tags.append(tag)
            entry.cfgs[tag] = cfg
        if not entry.tags:
            entry.tags.append('')
            entry.cfgs[''] = untrained
        default_cfgs[ModelName(architecture, kind).variant] = entry
    register_kinds(architecture, _create, __name__, kinds)


def _create(
    variant: str,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    scales: ScalesSource | None = None,
    **kwargs: Any,
) -> nn.Module:
    name = ModelName.parse(variant)
    config = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    own = _is_own(name, config)
    scales = requested_scales(variant, pretrained, pretrained_cfg, pretrained_cfg_overlay, scales, kwargs, beside=own)
    create = _original(name)
    if name.kind == 'branches':
        refuse_scales(variant, scales)
        if pretrained and not own:
            fetch(config, kwargs.get('cache_dir'))
        return create(pretrained=pretrained, pretrained_cfg=config, **kwargs)
    if pretrained and name.kind != 'target' and not own:
        raise ValueError(
            f'{variant} has no pretrained weights: its kernels are sums of branches. Those of '
            f'{name.architecture} can be trained further, with scales; this one starts without any.'
        )
    features = {key: kwargs.pop(key) for key in ('features_only', 'out_indices', 'output_fmt') if key in kwargs}
    model = _make(name, create, config, pretrained, own, scales, kwargs)
    return _features(model, create, kwargs, **features)


def _is_own(name: ModelName, config: PretrainedCfg) -> bool:
    """Returns whether weights are those of the model itself, and not of timm's original."""
    if config.source in _HUB_SOURCES:
        return True
    return timm.is_model(name.of_kind('branches')) and bool(config.file or config.state_dict)


def _original(name: ModelName) -> Callable[..., nn.Module]:
    if name.network.startswith('mobileone_'):
        # timm's entrypoint takes no strides.
        return partial(create_byobnet, name.network)
    return model_entrypoint(name.network)


def _make(
    name: ModelName,
    create: Callable[..., nn.Module],
    config: PretrainedCfg,
    pretrained: bool,
    own: bool,
    scales: ScalesSource | None,
    kwargs: dict[str, Any],
) -> nn.Module:
    of_timm = pretrained and not own
    repository = fetch(config, kwargs.get('cache_dir')) if of_timm else ''
    # timm loads the original's weights into the original, whatever their file format, channels and classes.
    original: Any = create(pretrained=of_timm, pretrained_cfg=config, **kwargs)
    plain = _plain(original, weights=of_timm)
    plain.architecture = name.network
    if of_timm and plain is not original and isinstance(scales, str) and scales == IMPLIED:
        scales = implied_scales(original).renamed(name.network)
    type(plain)._model_args = ModelArgsWithoutScales()
    _state_constructed_strides(plain, create, kwargs)
    model: Any = make_kind(plain, name.kind, scales, init=not pretrained)
    first_conv = plain_first_conv(model, resolve_pretrained_cfg(name.network).first_conv)
    settings = {**config.to_dict(), 'architecture': name.variant, 'first_conv': first_conv}
    model.pretrained_cfg = model.default_cfg = settings
    if hasattr(model, '_traits'):
        model._traits = {**model._traits, 'first_conv': first_conv}
    if not pretrained:
        forget_origin(model)
    elif plain is not original and repository:
        note_merged(model, repository)
    if own and pretrained:
        load_pretrained(model, settings, num_classes=model.num_classes, in_chans=kwargs.get('in_chans') or 3)
    return model


def _plain(original: nn.Module, weights: bool = False) -> Any:
    """Returns the plain twin of a network with branches, and any other as it is."""
    return plain_twin(original, weights) if any(multi_branch_blocks(original)) else original


def _features(
    model: nn.Module,
    create: Callable[..., nn.Module],
    kwargs: dict[str, Any],
    features_only: bool = False,
    out_indices: Any = None,
    output_fmt: str = 'NCHW',
) -> nn.Module:
    if not features_only:
        return model
    if out_indices is None:
        strides = {key: kwargs[key] for key in ('strides',) if key in kwargs}
        timms: Any = create(features_only=True, device='meta', **strides)
        out_indices = timms.feature_info.out_indices
    features = FeatureGetterNet(model, out_indices=out_indices, output_fmt=output_fmt)
    return name_features(features, network_name(model), {'model': ''})


def plain_first_conv(model: nn.Module, names: Any) -> Any:
    """Returns what timm adapts to other image channels: the first convolution, or its branches but the identity.

    Args:
        model: The plain network or a twin of it.
        names: What it is in timm's original: a name, or those of its branches.
    """
    modules = dict(model.named_modules())
    name = names if isinstance(names, str) else (names or ('',))[0]
    for end in range(name.count('.') + 1):
        block = name.rsplit('.', end)[0]
        if isinstance(modules.get(block), PlainBlock):
            name = names = f'{block}.conv'
    conv = modules.get(name)
    return names if conv is None or branches_of(conv) is None else None


def _state_constructed_strides(plain: nn.Module, create: Callable[..., nn.Module], kwargs: dict[str, Any]) -> None:
    """Lets convolutions whose stride an `output_stride` turned into dilation carry the one of before."""
    if 'output_stride' not in kwargs:
        return
    kept = {key: value for key, value in kwargs.items() if key not in ('output_stride', 'device')}
    original: Any = _plain(create(pretrained=False, device='meta', **kept))
    prior = repvgg_prior(original)
    for name, each in prior.items():
        conv: Any = plain.get_submodule(name)
        replace(each, stride=tuple(original.get_submodule(name).stride)).put_on(conv)
