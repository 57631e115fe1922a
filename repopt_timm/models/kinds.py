"""Target, Hyper-Search and CSLA models of one architecture, and any timm model as all three."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import timm
from timm.models import (
    load_pretrained,
    model_entrypoint,
    register_model,
    register_notrace_module,
    resolve_pretrained_cfg,
)
from timm.models._features import FeatureGetterNet
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from timm.models._pretrained import DefaultCfg
from timm.models._registry import get_arch_pretrained_cfgs
from torch import nn

from .. import reparam
from ..names import PREFIX, ModelName
from ..reparam import CSLAConv2d, convert_, prepare, repvgg_prior
from ..sources import ScalesSource, load_scales, scales_beside_weights

__all__ = ['ensure_registered', 'make_kind', 'register_kinds', 'register_twins', 'requested_scales', 'to_plain']

register_notrace_module(CSLAConv2d)

# A network of timm without branches is the original itself.
_KINDS_OF_PLAIN = ('target', 'hs', 'csla')

default_cfgs: dict[str, DefaultCfg] = {}
"""timm looks here for the configurations of what this module registers."""


class ModelArgsWithoutScales:
    """Keeps scales out of the factory arguments that timm records on a model and writes to config.json.

    Scales are data, not a setting. A class's attribute, as timm sets it on the instance after the model is made.
    """

    def __get__(self, model: Any, owner: type) -> Any:
        if model is None:
            return self
        if '_model_args' not in vars(model):
            raise AttributeError(f"'{owner.__name__}' object has no attribute '_model_args'")
        return vars(model)['_model_args']

    def __set__(self, model: Any, args: dict[str, Any]) -> None:
        vars(model)['_model_args'] = {key: value for key, value in args.items() if key != 'scales'}


def make_kind(model: nn.Module, kind: str, source: ScalesSource | None, init: bool = True) -> nn.Module:
    """Makes the target, Hyper-Search or CSLA model of a plain network.

    Args:
        model: The plain network; changed in place.
        kind: `target`, `hs` or `csla`.
        source: Scales, see `load_scales`. Without any a target is a plain network, a search starts from the initial
            values, and a CSLA model raises until a checkpoint brings some.
        init: Apply the Rule of Initialization to a target.

    Raises:
        ValueError: If the scales do not belong to the network.
    """
    scales = None if source is None else load_scales(source, model)
    if kind == 'hs':
        model = convert_(model, scales, trainable_scales=True)
    elif kind == 'csla':
        model = convert_(model, repvgg_prior(model) if scales is None else scales, trainable_scales=False)
    elif scales is not None:
        prepare(model, scales, init)
    target: Any = model
    target.scales_provenance = {} if scales is None else scales.provenance
    return model


def to_plain(twin: nn.Module) -> nn.Module:
    """Returns the plain network of a Hyper-Search or CSLA model: merged kernels, the same function.

    Args:
        twin: Any twin. It is copied; dtype, device, mode and attributes stay as they are.

    Returns:
        The plain network, which carries the twin's scales: both can be trained side by side from the same start.

    Raises:
        ValueError: If the model is plain already, or has no scales yet.
    """
    plain: Any = reparam.to_plain(twin)
    config = getattr(plain, 'pretrained_cfg', None)
    if isinstance(config, dict) and 'architecture' in config:
        first_conv = config.get('first_conv')
        if isinstance(first_conv, tuple | list):
            first_conv = first_conv[0].partition('.branches.')[0]
        name = ModelName.parse(config['architecture']).architecture
        plain.pretrained_cfg = plain.default_cfg = {**config, 'architecture': name, 'first_conv': first_conv}
        if hasattr(plain, '_traits'):
            plain._traits = {**plain._traits, 'first_conv': first_conv}
    return plain


def requested_scales(
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any,
    pretrained_cfg_overlay: dict[str, Any] | None,
    scales: ScalesSource | None,
    kwargs: dict[str, Any],
) -> ScalesSource | None:
    """Returns the scales that a call of `timm.create_model` means: those named, else those beside the weights.

    Args:
        variant: Name of the model.
        pretrained: Whether weights are asked for.
        pretrained_cfg: timm's argument.
        pretrained_cfg_overlay: timm's argument.
        scales: The argument `scales`.
        kwargs: Further arguments of the entrypoint.
    """
    weights = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    if scales is not None and _is_from_config(scales, weights, kwargs):
        scales = None
    if scales is None and (pretrained or weights.get('source') in ('hf-hub', 'local-dir')):
        scales = scales_beside_weights(weights)
    return scales


def _is_from_config(scales: ScalesSource, weights: dict[str, Any], kwargs: dict[str, Any]) -> bool:
    """Takes `scales` out of the model arguments of a downloaded config: it could name any file or repository."""
    args = kwargs.get('pretrained_model_args')
    if args is None and weights.get('source') == 'hf-hub':
        # Before 1.0.31 timm does not say which arguments come from the config.
        args = load_model_config_from_hf(weights['hf_hub_id'])[2]
    elif args is None and weights.get('source') == 'local-dir':
        args = load_model_config_from_path(weights['file'])[2]
    return args is not None and args.pop('scales', None) == scales


def register_kinds(architecture: str, create: Callable[..., nn.Module], module: str, kinds: Iterable[str]) -> None:
    """Registers models of an architecture with timm.

    Args:
        architecture: Name of the plain model.
        create: Function of variant, `pretrained` and timm's arguments that creates it.
        module: Name of the module whose `default_cfgs` describe them.
        kinds: The kinds to register.
    """
    for kind in kinds:
        _register(ModelName(architecture, kind).variant, create, module)


def _register(variant: str, create: Callable[..., nn.Module], module: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(variant, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    entrypoint.__module__ = module
    entrypoint.__doc__ = f'{variant}, see `repopt_timm.register_twins`.'
    setattr(sys.modules[module], variant, register_model(entrypoint))


def register_twins(name: str) -> None:
    """Registers `repopt_<name>`, `repopt_<name>_hs` and `repopt_<name>_csla` of a timm model with timm.

    All of the model's arguments work, and `scales=`. `pretrained=True` of the target takes timm's weights; with scales
    they stay as they are, for fine-tuning. Safe to call again.

    Args:
        name: Name of a timm model without multi-branch blocks, such as `resnet18`.

    Raises:
        ValueError: If timm does not know the model.

    Example:
        >>> register_twins('resnet18')
        >>> search = timm.create_model('repopt_resnet18_hs', num_classes=10)
    """
    if not timm.is_model(name) or '.' in name:
        raise ValueError(f"timm does not know a model '{name}': name one without a tag, see timm.list_models().")
    architecture = PREFIX + name
    if timm.is_model(architecture):
        return
    cfgs = get_arch_pretrained_cfgs(name)
    base = resolve_pretrained_cfg(name)
    for kind in _KINDS_OF_PLAIN:
        entry = DefaultCfg()
        for full_name, cfg in cfgs.items() if kind == 'target' else ():
            tag = full_name.partition('.')[2]
            entry.tags.append(tag)
            entry.cfgs[tag] = replace(cfg, architecture=architecture)
        if not entry.tags:
            entry.tags.append('')
            entry.cfgs[''] = replace(base, url=None, hf_hub_id=None, file=None, tag='')
        default_cfgs[ModelName(architecture, kind).variant] = entry
    register_kinds(architecture, _create_twin, __name__, _KINDS_OF_PLAIN)


def ensure_registered(model_name: str) -> None:
    """Registers the twins that a name such as `repopt_resnet18_hs` asks for, if timm does not know it yet."""
    name = ModelName.parse(model_name.rpartition(':')[2].rpartition('/')[2])
    base = name.architecture.removeprefix(PREFIX)
    if base != name.architecture and not timm.is_model(name.variant) and timm.is_model(base):
        register_twins(base)


def _create_twin(
    variant: str,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    scales: ScalesSource | None = None,
    features_only: bool = False,
    out_indices: Any = None,
    output_fmt: str = 'NCHW',
    **kwargs: Any,
) -> nn.Module:
    name = ModelName.parse(variant)
    scales = requested_scales(variant, pretrained, pretrained_cfg, pretrained_cfg_overlay, scales, kwargs)
    config = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    own = config.source in ('hf-hub', 'local-dir') and name.kind != 'target'
    if pretrained and name.kind != 'target' and not own:
        raise ValueError(
            f'{variant} has no pretrained weights: its kernels are sums of branches. Train {name.architecture} with '
            f'pretrained=True and scales, or search from the start.'
        )
    create = model_entrypoint(name.network)
    plain: Any = create(pretrained=pretrained and not own, pretrained_cfg=config, **kwargs)
    plain.architecture = name.network
    type(plain)._model_args = ModelArgsWithoutScales()
    _state_constructed_strides(plain, create, kwargs)
    model: Any = make_kind(plain, name.kind, scales, init=not pretrained)
    first_conv = _first_conv(model, resolve_pretrained_cfg(name.network).first_conv)
    settings = {**config.to_dict(), 'architecture': variant, 'first_conv': first_conv}
    model.pretrained_cfg = model.default_cfg = settings
    if hasattr(model, '_traits'):
        model._traits = {**model._traits, 'first_conv': first_conv}
    if own and pretrained:
        load_pretrained(model, settings, num_classes=model.num_classes, in_chans=kwargs.get('in_chans') or 3)
    if features_only:
        if out_indices is None:
            out_indices = create(features_only=True, device='meta').feature_info.out_indices
        return FeatureGetterNet(model, out_indices=out_indices, output_fmt=output_fmt)
    return model


def _first_conv(model: nn.Module, name: Any) -> Any:
    """Returns what timm adapts to other image channels: the first convolution, or its branches but the identity."""
    conv = dict(model.named_modules()).get(name) if isinstance(name, str) else None
    if not isinstance(conv, CSLAConv2d):
        return name
    return tuple(f'{name}.branches.{branch}' for branch in conv.branches if branch != 'identity')


def _state_constructed_strides(plain: nn.Module, create: Callable[..., nn.Module], kwargs: dict[str, Any]) -> None:
    """Lets convolutions whose stride an `output_stride` turned into dilation carry the one of before."""
    if 'output_stride' not in kwargs:
        return
    kept = {key: value for key, value in kwargs.items() if key not in ('output_stride', 'device')}
    original: Any = create(pretrained=False, device='meta', **kept)
    prior = repvgg_prior(original)
    for name, each in prior.items():
        conv: Any = plain.get_submodule(name)
        replace(each, stride=tuple(original.get_submodule(name).stride)).put_on(conv)
