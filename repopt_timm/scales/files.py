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
from ..reparam import Geometry
from .scales import FORMAT, Scales

__all__ = ['CHECKPOINT_KEY', 'checkpoint_entry', 'read_scale_file']

CHECKPOINT_KEY = 'repopt'
"""Key under which a checkpoint states what its scales belong to, see `checkpoint_entry`."""

# Key of a scale, or of the identity's operator, in a state dict of ours: module, branch.
_SCALE_KEY = re.compile(r'(.+)\.branches\.(?:([^.]+)\.scale|(identity)\.weight)')
_OPERATOR_KEY = re.compile(r'(.+)\.branches\.([^.]+)\.weight')


def read_scale_file(path: str | os.PathLike, architecture: str | None = None) -> Scales:
    """Reads scales from a file.

    Args:
        path: A `.safetensors` file that `Scales.save` wrote; a checkpoint of a `_hs` or `_csla` run as timm, torch or
            safetensors write it; a `*-scales.pth` or a hyper-search checkpoint of the reference repository.
        architecture: Name of the network that is hoped for, where the file does not say and its shapes fit several.

    Returns:
        The scales; without a geometry if the file does not state it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has no scales, is damaged, or of another version.
    """
    source = os.fspath(path)
    checkpoint = read_checkpoint(path)
    if checkpoint.get('__metadata__', {}).get('format') == FORMAT:
        return Scales.from_bytes(Path(path).read_bytes(), source)
    state_dict = select_state_dict(checkpoint)
    modules, counts = _modules_of(state_dict), _counts_of(state_dict)
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
    order = list(geometry) if set(geometry) == set(modules) else sorted(modules, key=_depth_key)
    modules = {name: modules[name] for name in order}
    counts = {module: each for module, each in counts.items() if module in modules}
    name = checkpoint.get('arch')
    if isinstance(name, str):
        network = ModelName.parse(name).network
    else:
        channels = {module: len(vectors['kxk']) for module, vectors in modules.items() if 'kxk' in vectors}
        network = infer_architecture(channels, architecture) or ''
    return Scales(network, modules, geometry, counts, {'converted_from': Path(source).name}, source)


def checkpoint_entry(scales: Scales) -> dict[str, Any]:
    """Returns what a checkpoint of a twin stores under `CHECKPOINT_KEY`, as its tensors do not state it."""
    return {'architecture': scales.architecture, 'geometry': {n: str(each) for n, each in scales.geometry.items()}}


def _modules_of(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    published = scale_names(state_dict.keys())
    for key, tensor in state_dict.items():
        if match := _SCALE_KEY.fullmatch(key):
            module, branch = match[1], match[2] or match[3]
        elif key in published:
            module, branch = published[key]
        else:
            continue
        modules.setdefault(module, {})[branch] = tensor.flatten() if branch == 'identity' else tensor
    # A convolution that is used in several places is there under each name, with the same memory.
    first: dict[Any, str] = {}
    for module, vectors in modules.items():
        first.setdefault(tuple(sorted((branch, each.data_ptr()) for branch, each in vectors.items())), module)
    return {module: modules[module] for module in first.values()}


def _counts_of(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for key, tensor in state_dict.items():
        match = _OPERATOR_KEY.fullmatch(key)
        if match and tensor.ndim == 5:
            counts.setdefault(match[1], {})[match[2]] = len(tensor)
    return counts


def _depth_key(module: str) -> tuple[bool, list[tuple[int, str]]]:
    # Files sort their keys, which puts block 10 before block 2 and the stages before the stem.
    parts = [(int(part), '') if part.isdigit() else (-1, part) for part in module.split('.')]
    return not module.startswith('stem'), parts
