"""Files that hold scales: our own, checkpoints of a Hyper-Search, and those of the method's reference repository."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..architectures import infer_architecture
from ..checkpoints.read import read_checkpoint, select_state_dict
from ..checkpoints.reference import refuse_fused, scale_names
from ..names import ModelName
from ..reparam import Geometry, Scales

CHECKPOINT_KEY = 'repopt'
"""Key under which a checkpoint states what its scales belong to, see `checkpoint_entry`."""

# Key in the state dict of a twin: module, whether it is an operator or a scale, branch.
_KEY = re.compile(r'(?:(.+)\.)?parametrizations\.weight\.(original|0\.(?:operators|scales)\.(.+))')


def read_scale_file(path: str | os.PathLike, architecture: str | None = None) -> Scales:
    """Reads scales from a file; without a statement in the file they have no geometry, and the start `paper`.

    It is a `.safetensors` file that `Scales.save` wrote, a checkpoint of a `_hs` or `_csla` run as timm, torch or
    safetensors write it, or a `*-scales.pth` or hyper-search checkpoint of the reference repository. `architecture` is
    the network that is hoped for, where the file does not say and its shapes fit several.
    """
    source = os.fspath(path)
    checkpoint = read_checkpoint(path)
    if 'fingerprint' in checkpoint.get('__metadata__', ()):
        return Scales.from_bytes(Path(path).read_bytes(), source)
    return searched_scales(checkpoint, source, architecture)


def searched_scales(checkpoint: Mapping[str, Any], source: str, architecture: str | None = None) -> Scales:
    """Returns the scales of a checkpoint that is read already from `source`, see `read_scale_file`."""
    state_dict = select_state_dict(checkpoint)
    modules, counts = _branches_of(state_dict)
    if not modules:
        refuse_fused(state_dict, source)
        if any('.rbr_dense.' in key for key in state_dict):
            raise ValueError(
                f'{source} is a RepVGG as its authors train it: no scales were searched. Read those that its branches '
                f'imply: repopt-timm convert-checkpoint {source} --scales implied --out DIR.'
            )
        raise ValueError(
            f'{source}: no scales in it. Expected a file of scales or a checkpoint of a hyper-search (_hs) model.'
        )
    entry = checkpoint.get(CHECKPOINT_KEY) or {}
    geometry = {name: Geometry.parse(text) for name, text in entry.get('geometry', {}).items()}
    order = geometry if set(geometry) == set(modules) else sorted(modules, key=_depth_key)
    modules = {name: modules[name] for name in order}
    network = checkpoint.get('arch')
    if isinstance(network, str):
        network = ModelName.parse(network).network
    else:
        channels = {name: len(vectors['kxk']) for name, vectors in modules.items() if 'kxk' in vectors}
        network = infer_architecture(channels, architecture) or ''
    start = entry.get('start', 'paper')
    return Scales(network, modules, geometry, counts, {'converted_from': Path(source).name}, source, start)


def checkpoint_entry(scales: Scales) -> dict[str, Any]:
    """Returns what a checkpoint of a twin stores under `CHECKPOINT_KEY`, as its tensors do not state it."""
    geometry = {name: str(each) for name, each in scales.geometry.items()}
    return {'geometry': geometry, 'start': scales.start}


def _branches_of(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, int]]]:
    """Returns module name to branch name to scale, and to number of equal branches."""
    modules: dict[str, dict[str, Tensor]] = {}
    rows: dict[tuple[str, str], int] = {}
    published = scale_names(state_dict.keys())
    for key, tensor in state_dict.items():
        if match := _KEY.fullmatch(key):
            module, branch, is_scale = match[1] or '', match[3] or 'kxk', '0.scales' in match[2]
            if not is_scale:
                rows[module, branch] = len(tensor)
        elif key in published:
            module, branch, is_scale = *published[key], True
        else:
            continue
        # An identity has no scale: its operator is what the search finds.
        if is_scale or branch == 'identity':
            modules.setdefault(module, {})[branch] = tensor.flatten()
    # A convolution that is used in several places is there under each name, with the same memory.
    first: dict[Any, str] = {}
    for module, found in modules.items():
        first.setdefault(tuple(sorted((branch, each.data_ptr()) for branch, each in found.items())), module)
    modules = {module: modules[module] for module in first.values()}
    counts = {
        module: {branch: rows.get((module, branch), len(each)) // len(each) for branch, each in found.items()}
        for module, found in modules.items()
    }
    return modules, counts


def _depth_key(module: str) -> tuple[bool, list[tuple[int, str]]]:
    # Files sort their keys, which puts block 10 before block 2 and the stages before the stem.
    parts = [(int(part), '') if part.isdigit() else (-1, part) for part in module.split('.')]
    return not module.startswith('stem'), parts
