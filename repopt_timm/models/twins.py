"""Target, Hyper-Search and CSLA models of timm's networks by our names, and the originals with branches."""

import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import timm
from timm.models import (
    build_model_with_cfg,
    get_pretrained_cfg,
    model_entrypoint,
    parse_model_name,
    register_model,
    register_notrace_module,
    resolve_pretrained_cfg,
)
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from timm.models._pretrained import DefaultCfg
from timm.models._registry import get_arch_pretrained_cfgs
from torch import nn

from ..architectures import ARCHITECTURES
from ..blocks import PlainBlock, implied_scales, plain_twin
from ..names import KINDS, MULTI_BRANCH, PREFIX, ModelName
from ..reparam import Branches, convert_, multi_branch_blocks, name_as_part, prepare, repvgg_prior
from ..sources import IMPLIED, ScalesSource, load_scales
from ..weights_origin import note_merged
from .byobnet import create_byobnet, feature_indices
from .records import Twin, first_conv_of, take_name
from .repopt_vgg import RepOptVgg
from .weights import choose_weights, fetch, requested_scales, restore

default_cfgs: dict[str, DefaultCfg] = {}
"""timm looks here for the configurations of what this module registers."""

# A tracer records a CSLA convolution's kernel as one call.
register_notrace_module(Branches)


def register_models() -> None:
    """Registers RepOpt-VGG, and the twins of timm's multi-branch networks as far as this timm has them."""
    for name in ARCHITECTURES:
        _register_kinds(name, RepOptVgg.__module__, KINDS)
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


def _register(name: str, kinds: Iterable[str]) -> None:
    architecture = PREFIX + name
    untrained = replace(resolve_pretrained_cfg(name), url=None, hf_hub_id=None, file=None, tag='')
    for kind in kinds:
        cfgs = get_arch_pretrained_cfgs(name) if kind in ('target', 'branches') else {}
        tags = {full_name.partition('.')[2]: cfg for full_name, cfg in cfgs.items()} or {'': untrained}
        entry = default_cfgs[ModelName(architecture, kind).variant] = DefaultCfg()
        entry.tags.extend(tags)
        entry.cfgs.update(tags)
    _register_kinds(architecture, __name__, kinds)


def _register_kinds(architecture: str, module: str, kinds: Iterable[str]) -> None:
    """Registers models whose configurations are in the `default_cfgs` of a module, where timm looks for them."""
    for kind in kinds:
        variant = ModelName(architecture, kind).variant
        entrypoint: Any = functools.partial(create, variant)
        entrypoint.__name__, entrypoint.__module__ = variant, module
        entrypoint.__doc__ = f'The {kind} model of {architecture}.'
        setattr(sys.modules[module], variant, register_model(entrypoint))


def ensure_registered(model_name: str) -> None:
    """Registers the twins that a name such as `repopt_resnet18_hs` asks for, if timm does not know it yet."""
    name = ModelName.parse(model_name)
    base = name.architecture.removeprefix(PREFIX)
    if base != name.architecture and not timm.is_model(name.variant) and timm.is_model(base):
        register_twins(base)


def resolve_model(model_name: str) -> tuple[str, dict[str, Any]]:
    """Registers the model that a name, a repository or a `local-dir:FOLDER` stands for, if it is a twin.

    Returns the model's name, which timm need not know, and the arguments that the `config.json` keeps for it.
    """
    source, name = parse_model_name(model_name)
    saved_args: dict[str, Any] = {}
    if source is not None:
        load: Any = load_model_config_from_hf if source == 'hf-hub' else load_model_config_from_path
        _, name, saved_args = load(name)
    ensure_registered(name)
    return name, saved_args


def create(
    variant: str,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    scales: ScalesSource | None = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Creates any model of this package in timm's way: its records, its weights, its scales and its features."""
    name = ModelName.parse(variant)
    is_vgg = name.architecture in ARCHITECTURES
    config = choose_weights(variant, pretrained, pretrained_cfg, pretrained_cfg_overlay)
    if not pretrained:
        config = replace(config, license=None, notes=None)
    # Other weights are those of timm's original.
    own = config.source in ('hf-hub', 'local-dir') or (
        timm.is_model(name.of_kind('branches')) and bool(config.file or config.state_dict)
    )
    of_timm = pretrained and not own
    scales = requested_scales(name, config, scales, beside=pretrained and own)
    if of_timm and name.kind in ('hs', 'csla'):
        raise ValueError(
            f'{variant} takes no weights of timm: its kernels are sums of branches. Take {name.architecture}.'
        )
    repository = fetch(config, cache_dir) if of_timm else ''
    original_name = name.of_kind('branches') if is_vgg else name.network
    # timm's entrypoint of MobileOne takes no strides.
    own_strides = is_vgg or name.network.startswith('mobileone_')
    original: Any = functools.partial(create_byobnet, original_name) if own_strides else model_entrypoint(original_name)
    original_config = replace(config, first_conv=get_pretrained_cfg(original_name).first_conv)  # type: ignore[union-attr]
    # As timm does itself from 1.0.31 on.
    recorded = {key: each for key, each in kwargs.items() if key not in ('device', 'dtype', 'pretrained_model_args')}
    if name.kind == 'branches':
        model: Any = original(pretrained=pretrained, pretrained_cfg=original_config, cache_dir=cache_dir, **kwargs)
        model._model_args = recorded
        return model
    whole: Any = None

    def make(**arguments: Any) -> nn.Module:
        nonlocal whole
        branches: Any = None
        if is_vgg:
            whole = RepOptVgg(ARCHITECTURES[name.architecture], name.architecture, **arguments)
            if of_timm and not isinstance(whole.stem.attn, nn.Identity):
                raise ValueError(
                    "RepVGG's squeeze-and-excitation comes before the ReLU, ours after it, so its weights do not fit. "
                    'Use repopt_repvgg_d2se.'
                )
        if of_timm or not is_vgg:
            # timm loads the original's weights into the original, whatever their file format, channels and classes.
            branches = original(pretrained=of_timm, pretrained_cfg=original_config, cache_dir=cache_dir, **arguments)
        if is_vgg and of_timm:
            whole.load_state_dict(plain_twin(branches, weights=True).state_dict())
        elif not is_vgg:
            whole = plain_twin(branches, of_timm) if any(multi_branch_blocks(branches)) else branches
            whole.__class__ = _twin_class(whole.__class__)
            take_name(whole, name)
            if 'output_stride' in arguments:
                _state_constructed_strides(whole, original, arguments)
        source = scales
        if of_timm and whole is not branches and isinstance(source, str) and source == IMPLIED:
            source = implied_scales(branches).renamed(name.network)
        found = None if source is None else load_scales(source, whole)
        if name.kind != 'target':
            # A CSLA model without scales raises until a checkpoint brings some.
            prior = repvgg_prior(whole) if name.kind == 'csla' else None
            convert_(whole, prior if found is None else found, trainable_scales=name.kind == 'hs')
        elif found is not None:
            prepare(whole, found, init=not pretrained)
        whole.scales_provenance = {} if found is None else found.provenance
        return whole

    feature_cfg: dict[str, Any] = {}
    if is_vgg:
        feature_cfg = {'flatten_sequential': True, 'out_indices': feature_indices(variant, **kwargs)}
    elif kwargs.get('features_only'):
        strides = {'strides': kwargs['strides']} if 'strides' in kwargs else {}
        theirs = original(features_only=True, device='meta', **strides).feature_info
        flatten = any('.' in each['module'] for each in theirs.info)
        feature_cfg = {'feature_cls': 'getter', 'out_indices': theirs.out_indices, 'flatten_sequential': flatten}
    first_conv = first_conv_of(get_pretrained_cfg(name.architecture))
    model = build_model_with_cfg(
        make,
        variant,
        pretrained and own,
        pretrained_cfg=replace(config, architecture=variant, first_conv=first_conv_of(config, name.kind)),  # type: ignore[arg-type]
        pretrained_filter_fn=functools.partial(restore, first_conv=first_conv),
        feature_cfg=feature_cfg,
        cache_dir=cache_dir,
        **kwargs,
    )
    model._model_args = recorded
    if model is not whole:
        names = {module: child for child, module in whole.named_modules()}
        model.architecture = name.network
        name_as_part(model, {child: names.get(module, '') for child, module in model.named_children()})
    if repository and any(isinstance(module, PlainBlock) for module in model.modules()):
        note_merged(model, repository)
    return model


def _state_constructed_strides(plain: nn.Module, create: Callable[..., nn.Module], kwargs: dict[str, Any]) -> None:
    """Lets convolutions whose stride an `output_stride` turned into dilation carry the one of before."""
    kept = {key: value for key, value in kwargs.items() if key not in ('output_stride', 'device')}
    original: Any = create(pretrained=False, device='meta', **kept)
    original = plain_twin(original) if any(multi_branch_blocks(original)) else original
    for name, each in repvgg_prior(original).items():
        conv: Any = plain.get_submodule(name)
        replace(each, stride=tuple(original.get_submodule(name).stride)).put_on(conv)


@functools.cache
def _twin_class(network: Any) -> type:
    """Makes the class of a twin: a subclass, so that timm's own class stays as it is for the whole process."""

    def reduce(model: nn.Module, protocol: Any) -> tuple:
        return _new_twin, (network,), vars(model)

    attributes = {'__module__': network.__module__, '__reduce_ex__': reduce}
    return type(network.__name__, (Twin, network), attributes)


def _new_twin(network: type) -> Any:
    made: Any = _twin_class(network)
    return made.__new__(made)
