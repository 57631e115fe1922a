"""Target, Hyper-Search and CSLA models of timm's networks by our names, and the originals with branches."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import timm
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    model_entrypoint,
    parse_model_name,
    register_model,
    register_notrace_module,
    resolve_pretrained_cfg,
)
from timm.models._registry import get_arch_pretrained_cfgs
from torch import nn

from ..architectures import ARCHITECTURES
from ..blocks import PlainBlock, implied_scales, plain_twin
from ..names import KINDS, MULTI_BRANCH, PREFIX, ModelName
from ..reparam import Branches, convert_, multi_branch_blocks, prepare, repvgg_prior
from ..sources import IMPLIED, ScalesSource, load_scales
from ..weights_origin import note_merged
from .byobnet import create_byobnet
from .records import Twin, first_conv_of, take_name
from .repopt_vgg import RepOptVgg, default_cfgs
from .weights import choose_weights, fetch, load_config, requested_scales, restore

# A tracer records a CSLA convolution's kernel as one call.
register_notrace_module(Branches)


def register_models() -> None:
    """Registers RepOpt-VGG, and the twins of timm's multi-branch networks as far as this timm has them."""
    for name in ARCHITECTURES:
        _register_kinds(name, KINDS)
    for pattern in MULTI_BRANCH:
        for name in timm.list_models(pattern):
            _register(name, KINDS)


def register_twins(name: str) -> None:
    """Registers `repopt_<name>`, `repopt_<name>_hs` and `repopt_<name>_csla` of a timm model with timm.

    All of the model's arguments work, and `scales=`. `pretrained=True` of the target takes timm's weights; with scales
    they stay as they are, for fine-tuning. Safe to call again. Twins of timm's own multi-branch networks are there
    already: `repopt_mobileone_s0`.

    Args:
        name: Name of a timm model, such as `resnet18`. One with multi-branch blocks is made plain, see `plain_twin`.

    Raises:
        ValueError: If timm does not know the model.

    Example:
        >>> register_twins('resnet18')
        >>> search = timm.create_model('repopt_resnet18_hs', num_classes=10)
    """
    if not timm.is_model(name) or '.' in name or name.startswith(PREFIX):
        raise ValueError(
            f"timm does not know a model '{name}': name one of timm's without a tag, see timm.list_models()."
        )
    if not timm.is_model(PREFIX + name):
        _register(name, ('target', 'hs', 'csla'))


def _register(name: str, kinds: Iterable[str]) -> None:
    untrained = replace(resolve_pretrained_cfg(name), url=None, hf_hub_id=None, file=None, tag='')
    for kind in kinds:
        variant = ModelName(PREFIX + name, kind).variant
        found = get_arch_pretrained_cfgs(name) if kind in ('target', 'branches') else {}
        cfgs: dict[str, Any] = {variant + full_name.removeprefix(name): cfg for full_name, cfg in found.items()}
        default_cfgs.update(generate_default_cfgs(cfgs or {variant: untrained}))
    _register_kinds(PREFIX + name, kinds)


def _register_kinds(architecture: str, kinds: Iterable[str]) -> None:
    for kind in kinds:
        entrypoint: Any = functools.partial(create, ModelName(architecture, kind).variant)
        entrypoint.__name__ = ModelName(architecture, kind).variant
        # timm looks for configurations in the `default_cfgs` of this module.
        entrypoint.__module__ = __name__
        register_model(entrypoint)


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
        _, name, saved_args = load_config(source, name)
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
    """Creates any model of this package, with its weights and scales, as timm's entrypoints do."""
    name = ModelName.parse(variant)
    is_vgg = name.architecture in ARCHITECTURES
    config = choose_weights(variant, pretrained, pretrained_cfg, pretrained_cfg_overlay)
    if not pretrained:
        config = replace(config, license=None, notes=None)
    # Other weights belong to timm's original.
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
        return whole

    feature_cfg: dict[str, Any] = {}
    if kwargs.get('features_only'):
        numbers = {key: kwargs[key] for key in ('strides', 'depths', 'widths') if key in kwargs}
        theirs = original(features_only=True, device='meta', **numbers).feature_info
        flatten = any('.' in each['module'] for each in theirs.info)
        feature_cfg = {'out_indices': theirs.out_indices, 'flatten_sequential': flatten}
        feature_cfg['feature_cls'] = 'list' if is_vgg else 'getter'
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
        model.scales_provenance = getattr(whole, 'scales_provenance', {})
        model.repopt_names = {child: names.get(module, '') for child, module in model.named_children()}
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
    attributes = {
        '__module__': network.__module__,
        '__reduce_ex__': lambda twin, protocol: (_new_twin, (network,), vars(twin)),
    }
    return type(network.__name__, (Twin, network), attributes)


def _new_twin(network: type) -> Any:
    made: Any = _twin_class(network)
    return made.__new__(made)
