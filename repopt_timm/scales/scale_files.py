"""Files that hold scales: our own, checkpoints of a Hyper-Search, and those of the method's reference repository."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..architectures import infer_architecture
from ..checkpoints.read import read_checkpoint, select_state_dict
from ..checkpoints.reference_layout import scale_names
from ..names import ModelName
from ..reparam import Geometry, Scales

__all__ = ['CHECKPOINT_KEY', 'checkpoint_entry', 'read_scale_file']

CHECKPOINT_KEY = 'repopt'
"""Key under which a checkpoint states what its scales belong to, see `checkpoint_entry`."""

# Key of a scale, or of the identity's operator, in a state dict of ours: module, branch.
_OWN_KEY = re.compile(r'(.+)\.parametrizations\.weight\.0\.(?:scales\.([^.]+)|operators\.(identity))')
_OPERATOR_KEY = re.compile(r'(.+)\.parametrizations\.weight\.(?:0\.operators\.([^.]+)|(original))')


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
    metadata = checkpoint.get('__metadata__', {})
    if metadata.get('format'):
        return Scales.from_bytes(Path(path).read_bytes(), source)
    state_dict = select_state_dict(checkpoint)
    modules = _modules_of(state_dict)
    if not modules:
        raise ValueError(
            f'{source}: no scales in it. Expected a file of scales or a checkpoint of a hyper-search (_hs) model.'
        )
    provenance = {'converted_from': Path(source).name}
    entry = checkpoint.get(CHECKPOINT_KEY)
    geometry: Mapping[str, Geometry] = {}
    if isinstance(entry, Mapping) and isinstance(entry.get('geometry'), Mapping):
        geometry = _parse_geometry(entry['geometry'], source)
    order = list(geometry) if set(geometry) == set(modules) else sorted(modules, key=_depth_key)
    modules = {name: modules[name] for name in order}
    name = _network_of(checkpoint) or _infer(modules, architecture)
    counts = {module: each for module, each in _counts_of(state_dict).items() if module in modules}
    return Scales(name, modules, geometry, counts, provenance, source)


def checkpoint_entry(scales: Scales) -> dict[str, Any]:
    """Returns what a checkpoint of a twin stores under `CHECKPOINT_KEY`, as its tensors do not state it."""
    return {'architecture': scales.architecture, 'geometry': {n: str(each) for n, each in scales.geometry.items()}}


def _parse_geometry(geometry: Mapping[str, Any], source: str) -> dict[str, Geometry]:
    try:
        return {name: Geometry.parse(text) for name, text in geometry.items()}
    except ValueError as error:
        raise ValueError(f'{source}: {error} The file is damaged.') from None


def _modules_of(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    published = scale_names(state_dict.keys())
    for key, tensor in state_dict.items():
        if match := _OWN_KEY.fullmatch(key):
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
        scale = None if match is None else state_dict.get(
            f'{match[1]}.parametrizations.weight.0.scales.{match[2] or "kxk"}'
        )
        if match and scale is not None:
            counts.setdefault(match[1], {})[match[2] or 'kxk'] = len(tensor) // len(scale)
    return counts


def _network_of(checkpoint: Mapping[str, Any]) -> str:
    name = checkpoint.get('arch')
    return ModelName.parse(name).network if isinstance(name, str) else ''


def _infer(modules: Mapping[str, Mapping[str, Tensor]], preferred: str | None) -> str:
    channels = {module: len(vectors['kxk']) for module, vectors in modules.items() if 'kxk' in vectors}
    return infer_architecture(channels, preferred) or ''


def _depth_key(module: str) -> tuple[bool, list[tuple[int, str]]]:
    # Files sort their keys, which puts block 10 before block 2 and the stages before the stem.
    parts = [(int(part), '') if part.isdigit() else (-1, part) for part in module.split('.')]
    return not module.startswith('stem'), parts
