"""The scales that a target was trained with: a checkpoint holds their fingerprint, and their name or values."""

import argparse
from collections.abc import Mapping
from typing import Any

from torch import nn

from .reparam import geometry_of, network_name
from .scales import Scales
from .sources import ScalesSource, default_scales, load_scales

IMPLIED_KEY = 'implied_scales'
"""Key under which the checkpoint of a run with `--scales implied` has them: `modules`, `counts`, `provenance`."""


def trained_with(checkpoint: Mapping[str, Any]) -> set[str]:
    """Returns the fingerprints of the scales in the optimizer's state."""
    groups = (checkpoint.get('optimizer') or {}).get('param_groups', [])
    return {group['scales_fingerprint'] for group in groups if 'scales_fingerprint' in group}


def find_scales(
    checkpoint: Mapping[str, Any], model: nn.Module, source: str, given: ScalesSource | None = None
) -> Scales | None:
    """Returns the scales of a target's checkpoint: given ones, its own, or the ones that its arguments name.

    Returns None if it was trained without scales. A name in a file from anyone may lead anywhere, so only scales of the
    optimizer's own fingerprint are taken.
    """
    fingerprints = trained_with(checkpoint)
    if given is not None:
        scales = load_scales(given, model)
    elif not fingerprints:
        return None
    elif stored := checkpoint.get(IMPLIED_KEY):
        modules, geometry = stored['modules'], geometry_of(model, stored['modules'])
        scales = Scales(network_name(model), modules, geometry, stored['counts'], stored['provenance'], source)
    else:
        try:
            scales = load_scales(named_scales(checkpoint, source), model)
        except (OSError, ValueError) as error:
            raise ValueError(
                f'{source}: its model was trained with scales that it does not hold: {error} Name them (scales=..., '
                f'--scales).'
            ) from None
    if fingerprints and fingerprints != {scales.fingerprint}:
        raise ValueError(
            f'{source}: it was trained with the scales {", ".join(fingerprints)}, but those of '
            f"'{scales.source or scales.title}' are {scales.fingerprint}. Name the right ones (scales=..., --scales)."
        )
    return scales


def named_scales(checkpoint: Mapping[str, Any], source: str) -> str:
    """Returns what `load_scales` takes for the scales of a target's training; `initial` if it had none.

    That is `--scales`, `--model-kwargs`, or without them the pretrained model that the run started from.
    """
    if not trained_with(checkpoint):
        return 'initial'
    args = arguments_of(checkpoint)
    name = args.get('scales') or (args.get('model_kwargs') or {}).get('scales')
    if name is None and isinstance(args.get('model'), str):
        name = default_scales(args['model']).source
    if not isinstance(name, str):
        raise ValueError(f"'{source}' does not name the scales that it was trained with. Give them with --scales.")
    return name


def arguments_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a checkpoint's run; none if it does not have them."""
    args = checkpoint.get('args')
    return vars(args) if isinstance(args, argparse.Namespace) else {}
