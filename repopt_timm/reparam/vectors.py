"""What a set of scale vectors must satisfy, and its fingerprint."""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ['check_vectors', 'fingerprint', 'fingerprint_of']


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
        ValueError: If a branch is missing or left over, or a vector has a wrong shape, a NaN or infinite entry, or
            only zeros.
    """
    where = f"{source}: module '{module}'" if source else f"Module '{module}'"
    if expected is not None and set(vectors) != set(expected):
        raise ValueError(f'{where} has scales for the branches {sorted(vectors)}, expected {sorted(expected)}.')
    for name, vector in vectors.items():
        shape = tuple(vector.shape)
        if vector.ndim != 1 or (channels is not None and shape != (channels,)):
            wanted = f'({channels},)' if channels is not None else 'one dimension'
            raise ValueError(f"{where}: the scale of branch '{name}' has shape {shape}, expected {wanted}.")
        if not torch.isfinite(vector).all():
            bad = int((~torch.isfinite(vector)).nonzero()[0])
            raise ValueError(f"{where}: the scale of branch '{name}' is {vector[bad].item()} at channel {bad}.")
        if not vector.any():
            raise ValueError(f"{where}: the scale of branch '{name}' is all zeros: its weights would never train.")


def fingerprint(scales: Mapping[str, Mapping[str, Tensor]], identity: Mapping[str, Any] | None = None) -> str:
    """Computes the sha256 of scales: sorted module and branch names, the float32 bits, and `identity`.

    Args:
        scales: Module name to branch name to vector.
        identity: JSON-serializable facts that belong to the scales' identity, such as architecture and strides.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(identity or {}, sort_keys=True).encode())
    for module in sorted(scales):
        for branch in sorted(scales[module]):
            vector = scales[module][branch].detach().to('cpu', torch.float32).contiguous()
            digest.update(json.dumps([module, branch, vector.numel()]).encode())
            digest.update(vector.numpy().astype('<f4').tobytes())
    return digest.hexdigest()


def fingerprint_of(scales: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Returns the fingerprint that scales have, or that of their vectors if they are a plain mapping."""
    return getattr(scales, 'fingerprint', None) or fingerprint(scales)
