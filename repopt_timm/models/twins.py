"""Target, Hyper-Search and CSLA models of timm's networks by our names, and the originals with branches."""

import functools
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import timm
from timm.models import (
    _hub,
    build_model_with_cfg,
    get_pretrained_cfg,
    model_entrypoint,
    parse_model_name,
    register_model,
    register_notrace_module,
    resolve_pretrained_cfg,
)
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from timm.models._pretrained import DefaultCfg, PretrainedCfg
from timm.models._registry import get_arch_pretrained_cfgs
from torch import nn

from ..blocks import PlainBlock, implied_scales, plain_twin
from ..names import KINDS, MULTI_BRANCH, PREFIX, ModelName
from ..reparam import Branches, convert_, multi_branch_blocks, name_as_part, prepare, repvgg_prior
from ..sources import IMPLIED, ScalesSource, load_scales
from ..weights_origin import note_merged
from .byobnet import create_byobnet
from .weights import fetch, requested_scales, restore

__all__ = [
    'Twin',
    'build',
    'ensure_registered',
    'make_kind',
    'register_kinds',
    'register_multi_branch',
    'register_twins',
    'resolve_model',
    'stated_arguments',
    'take_name',
]

default_cfgs: dict[str, DefaultCfg] = {}
"""timm looks here for the configurations of what this module registers."""

_UNRECORDED = ('device', 'dtype', 'pretrained_model_args')

# A tracer records a CSLA convolution's kernel as one call.
register_notrace_module(Branches)


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
    if source is not None:
        load: Any = load_model_config_from_hf if source == 'hf-hub' else load_model_config_from_path
        _, name, saved_args = load(name)
    ensure_registered(name)
    return name, saved_args


class Twin(nn.Module):
    """What a timm network has besides its own class, as a model of this package."""

    pretrained_cfg: dict[str, Any]

    def __setattr__(self, name: str, value: Any) -> None:
        # timm's factory records its arguments on the model and writes them to config.json. Scales are data, no setting.
        if name == '_model_args':
            value = {key: each for key, each in value.items() if key != 'scales'}
        super().__setattr__(name, value)

    def note_plain(self) -> None:
        """States that the network is the target now; `to_plain` calls it."""
        take_name(self, ModelName(ModelName.parse(self.pretrained_cfg['architecture']).architecture))


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


def take_name(model: Any, name: ModelName) -> None:
    """Lets a network be the model called `name`: its name in timm's records, and the one that its scales go by.

    Args:
        model: The network, plain or a twin; changed in place.
        name: Name of a model that timm knows.
    """
    first_conv = _first_conv(get_pretrained_cfg(name.architecture), name.kind)
    model.architecture = name.network
    model.pretrained_cfg = {**model.pretrained_cfg, 'architecture': name.variant, 'first_conv': first_conv}
    model.default_cfg = model.pretrained_cfg
    if hasattr(model, '_traits'):
        model._traits = {**model._traits, 'first_conv': first_conv}


def _first_conv(config: PretrainedCfg | None, kind: str = 'target') -> Any:
    """Returns the name of what timm adapts to other image channels; None for a twin, see `weights.restore`."""
    given = config.first_conv if config else None
    if kind == 'branches' or not given:
        return given
    plain = {
        re.sub(r'\.conv_(kxk|scale|1x1)\..*', '.conv', each) for each in ([given] if isinstance(given, str) else given)
    }
    return None if kind != 'target' else plain.pop() if len(plain) == 1 else tuple(given)


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
    if kind != 'target':
        prior = repvgg_prior(model) if kind == 'csla' else None
        model = convert_(model, prior if scales is None else scales, trainable_scales=kind == 'hs')
    elif scales is not None:
        prepare(model, scales, init)
    made: Any = model
    made.scales_provenance = {} if scales is None else scales.provenance
    return model


def build(
    make: Callable[..., nn.Module],
    name: ModelName,
    config: PretrainedCfg,
    pretrained: bool,
    own: bool,
    feature_cfg: dict[str, Any],
    implied: bool = False,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds a model in timm's way: its records, its weights, and its features.

    Args:
        make: Function of timm's arguments that makes the network.
        name: Name of the model.
        config: Configuration of its weights.
        pretrained: Whether weights are asked for.
        own: Whether they are to be loaded here; otherwise `make` returns a network that has them.
        feature_cfg: timm's settings for `features_only`.
        implied: Let a target carry the scales that the branches of its weights imply.
        cache_dir: Folder for downloads. Defaults to the Hub client's.
        kwargs: timm's arguments.
    """
    whole: list[nn.Module] = []

    def make_once(**arguments: Any) -> nn.Module:
        whole.append(make(**arguments))
        return whole[0]

    if not pretrained:
        config = replace(config, license=None, notes=None)
    first_conv = _first_conv(get_pretrained_cfg(name.architecture))
    config = replace(config, architecture=name.variant, first_conv=_first_conv(config, name.kind))
    model: Any = build_model_with_cfg(
        make_once,
        name.variant,
        pretrained and own,
        pretrained_cfg=config,  # type: ignore[arg-type]
        pretrained_filter_fn=functools.partial(restore, first_conv=first_conv, implied=implied),
        feature_cfg=feature_cfg,
        cache_dir=cache_dir,
        **kwargs,
    )
    # As timm does itself from 1.0.31 on.
    model._model_args = {key: each for key, each in kwargs.items() if key not in _UNRECORDED}
    if model is not whole[0] and name.kind != 'branches':
        names = {module: child for child, module in whole[0].named_modules()}
        model.architecture = name.network
        name_as_part(model, {child: names.get(module, '') for child, module in model.named_children()})
    return model


def stated_arguments(model: nn.Module) -> dict[str, Any]:
    """Returns the arguments of `timm.create_model` that a repository has to state; from 1.0.31 on timm does so."""
    if hasattr(_hub, 'get_model_args'):
        return {}
    args: dict[str, Any] = getattr(model, '_model_args', {})
    return {key: each for key, each in args.items() if key != 'num_classes' and not key.endswith('_rate')}


def register_kinds(architecture: str, create: Callable[..., nn.Module], module: str, kinds: Iterable[str]) -> None:
    """Registers models of an architecture with timm.

    Args:
        architecture: Name of the plain model.
        create: Function of variant, `pretrained` and timm's arguments that creates it.
        module: Name of the module whose `default_cfgs` describe them.
        kinds: The kinds to register.
    """
    for kind in kinds:
        variant = ModelName(architecture, kind).variant
        entrypoint: Any = functools.partial(create, variant)
        entrypoint.__name__, entrypoint.__module__ = variant, module
        entrypoint.__doc__ = f'The {kind} model of {architecture}.'
        setattr(sys.modules[module], variant, register_model(entrypoint))


def _register(name: str, kinds: Iterable[str]) -> None:
    architecture = PREFIX + name
    untrained = replace(resolve_pretrained_cfg(name), url=None, hf_hub_id=None, file=None, tag='')
    for kind in kinds:
        cfgs = get_arch_pretrained_cfgs(name) if kind in ('target', 'branches') else {}
        tags = {full_name.partition('.')[2]: cfg for full_name, cfg in cfgs.items()} or {'': untrained}
        entry = default_cfgs[ModelName(architecture, kind).variant] = DefaultCfg()
        entry.tags.extend(tags)
        entry.cfgs.update(tags)
    register_kinds(architecture, _create, __name__, kinds)


def _create(
    variant: str,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    scales: ScalesSource | None = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    name = ModelName.parse(variant)
    config = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    own = config.source in ('hf-hub', 'local-dir') or (
        timm.is_model(name.of_kind('branches')) and bool(config.file or config.state_dict)
    )
    scales = requested_scales(name, config, pretrained, scales, kwargs, own)
    of_timm = pretrained and not own
    if of_timm and name.kind in ('hs', 'csla'):
        raise ValueError(
            f'{variant} has no pretrained weights: its kernels are sums of branches. Those of '
            f'{name.architecture} can be trained further, with scales; this one starts without any.'
        )
    repository = fetch(config, cache_dir) if of_timm else ''
    # timm's entrypoint of MobileOne takes no strides.
    own_strides = name.network.startswith('mobileone_')
    create: Any = functools.partial(create_byobnet, name.network) if own_strides else model_entrypoint(name.network)
    if name.kind == 'branches':
        return create(pretrained=pretrained, pretrained_cfg=config, cache_dir=cache_dir, **kwargs)

    def make(**arguments: Any) -> nn.Module:
        # timm loads the original's weights into the original, whatever their file format, channels and classes.
        original = create(pretrained=of_timm, pretrained_cfg=config, cache_dir=cache_dir, **arguments)
        plain, source = _plain(original, weights=of_timm), scales
        if of_timm and plain is not original and isinstance(source, str) and source == IMPLIED:
            source = implied_scales(original).renamed(name.network)
        plain.__class__ = _twin_class(plain.__class__)
        take_name(plain, name)
        if 'output_stride' in arguments:
            _state_constructed_strides(plain, create, arguments)
        return make_kind(plain, name.kind, source, init=not pretrained)

    feature_cfg: dict[str, Any] = {}
    if kwargs.get('features_only'):
        strides = {key: kwargs[key] for key in ('strides',) if key in kwargs}
        theirs = create(features_only=True, device='meta', **strides).feature_info
        flatten = any('.' in each['module'] for each in theirs.info)
        feature_cfg = {'feature_cls': 'getter', 'out_indices': theirs.out_indices, 'flatten_sequential': flatten}
    model = build(make, name, config, pretrained, own, feature_cfg, cache_dir=cache_dir, **kwargs)
    if of_timm and repository and any(isinstance(module, PlainBlock) for module in model.modules()):
        note_merged(model, repository)
    return model


def _plain(original: nn.Module, weights: bool = False) -> Any:
    """Returns the plain twin of a network with branches, and any other as it is."""
    return plain_twin(original, weights) if any(multi_branch_blocks(original)) else original


def _state_constructed_strides(plain: nn.Module, create: Callable[..., nn.Module], kwargs: dict[str, Any]) -> None:
    """Lets convolutions whose stride an `output_stride` turned into dilation carry the one of before."""
    kept = {key: value for key, value in kwargs.items() if key not in ('output_stride', 'device')}
    original: Any = _plain(create(pretrained=False, device='meta', **kept))
    for name, each in repvgg_prior(original).items():
        conv: Any = plain.get_submodule(name)
        replace(each, stride=tuple(original.get_submodule(name).stride)).put_on(conv)
