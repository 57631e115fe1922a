"""What a set of scale vectors must satisfy, and its fingerprint."""

import hashlib
import json
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .convolutions import Geometry

__all__ = ['check_vectors', 'fingerprint']


def check_vectors(
    module: str,
    vectors: Mapping[str, Tensor],
    channels: int | None = None,
    expected: Collection[str] | None = None,
    source: str = '',
) -> None:
    """Checks the scale vectors of one convolution.

    Args:
        module: Name of the convolution, for the error.
        vectors: Branch name to vector.
        channels: Number of output channels, if known.
        expected: Names of the branches that the convolution has, if known.
        source: File or repository that the vectors come from, for the error.

    Raises:
        ValueError: If a branch is missing or left over, or a vector has a wrong shape or a length of its own, a NaN or
            infinite entry, or, unless it is an identity's, only zeros.
    """
    where = f"{source}: module '{module}'" if source else f"Module '{module}'"
    if expected is not None and set(vectors) != set(expected):
        raise ValueError(f'{where} has scales for the branches {sorted(vectors)}, expected {sorted(expected)}.')
    for name, vector in vectors.items():
        if not isinstance(vector, Tensor):
            raise ValueError(f"{where}: the scale of branch '{name}' is a {type(vector).__name__}, expected a tensor.")
        if vector.is_complex():
            raise ValueError(f"{where}: the scale of branch '{name}' has complex numbers, expected real ones.")
        shape = tuple(vector.shape)
        if vector.ndim != 1 or (channels is not None and shape != (channels,)):
            wanted = f'({channels},)' if channels is not None else 'one dimension'
            raise ValueError(f"{where}: the scale of branch '{name}' has shape {shape}, expected {wanted}.")
        channels = len(vector)
        # As they are kept.
        vector = vector.float()
        finite = torch.isfinite(vector)
        if not finite.all():
            bad = int((~finite).nonzero()[0])
            raise ValueError(
                f"{where}: the scale of branch '{name}' is {vector[bad].item()} at channel {bad}, expected a finite "
                f'number. Take the scales of an earlier checkpoint, or search them anew.'
            )
        if name != 'identity' and not vector.any():
            raise ValueError(f"{where}: the scale of branch '{name}' is all zeros: its weights would never train.")


def fingerprint(
    scales: Mapping[str, Mapping[str, Tensor]],
    architecture: str = '',
    geometry: Mapping[str, Geometry] | None = None,
    counts: Mapping[str, Mapping[str, int]] | None = None,
) -> str:
    """Computes the sha256 of scales: what they were searched on, sorted module and branch names, the float32 bits.

    Args:
        scales: Module name to branch name to vector.
        architecture: Name of the network.
        geometry: Module name to geometry of its convolution.
        counts: Module name to branch name to count; 1 for a branch that is not in it.

    Returns:
        64 hexadecimal digits.
    """
    geometry, counts = geometry or {}, counts or {}
    digest = hashlib.sha256(json.dumps(architecture).encode())
    for module in sorted(scales):
        shape = str(geometry[module]) if module in geometry else None
        digest.update(json.dumps([module, shape]).encode())
        for branch in sorted(scales[module]):
            vector = scales[module][branch].detach().to('cpu', torch.float32).contiguous()
            count = counts.get(module, {}).get(branch, 1)
            digest.update(json.dumps([branch, count, vector.numel()]).encode())
            digest.update(vector.numpy().astype('<f4').tobytes())
    return digest.hexdigest()
