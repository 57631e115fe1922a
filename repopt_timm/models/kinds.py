"""Target, Hyper-Search and CSLA models of one architecture."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from timm.models import (
    register_model,
    register_notrace_module,
    resolve_pretrained_cfg,
)
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import nn

from .. import reparam
from ..names import ModelName
from ..reparam import Branches, convert_, name_as_part, prepare, repvgg_prior
from ..sources import ScalesSource, load_scales, scales_beside_weights

__all__ = [
    'ModelArgsWithoutScales',
    'make_kind',
    'name_features',
    'refuse_scales',
    'register_kinds',
    'requested_scales',
    'to_plain',
]

register_notrace_module(Branches)


def name_features(features: Any, architecture: str, names: dict[str, str]) -> nn.Module:
    """Lets a `features_only` network have the scales of the whole one.

    Args:
        features: The network, changed in place.
        architecture: Name of the whole plain network.
        names: Child of `features` to its name in the whole network, where timm has renamed it.

    Returns:
        `features`.
    """
    features.architecture = architecture
    name_as_part(features, names)
    return features


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
            first_conv = first_conv[0].partition('.parametrizations.')[0]
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
    beside: bool = True,
) -> ScalesSource | None:
    """Returns the scales that a call of `timm.create_model` means: those named, else those beside the weights.

    Args:
        variant: Name of the model.
        pretrained: Whether weights are asked for.
        pretrained_cfg: timm's argument.
        pretrained_cfg_overlay: timm's argument.
        scales: The argument `scales`.
        kwargs: Further arguments of the entrypoint.
        beside: Whether scales may lie beside the weights.
    """
    weights = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    if scales is not None and _is_from_config(scales, weights, kwargs):
        scales = None
    if beside and scales is None and (pretrained or weights.get('source') in ('hf-hub', 'local-dir')):
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


def refuse_scales(variant: str, scales: ScalesSource | None) -> None:
    """Raises a ValueError if a multi-branch original is to take scales."""
    if scales is not None:
        name = ModelName.parse(variant)
        raise ValueError(
            f'{variant} does not take scales: it has branches, which an ordinary optimizer trains (--opt sgd). '
            f'{name.architecture} is the plain network that takes them.'
        )


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
