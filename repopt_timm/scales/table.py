"""Tables about scales, for cards and terminals."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ['scales_table']


def scales_table(modules: Mapping[str, Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    """Summarizes scales per stage and branch.

    Args:
        modules: Module name to branch name to vector.

    Returns:
        Rows with `stage`, `branch` and, over all channels, `mean`, `min` and `max`.
    """
    rows = []
    for stage, members in _stages(modules).items():
        for branch in sorted({branch for vectors in members for branch in vectors}):
            vectors = [vectors[branch] for vectors in members if branch in vectors]
            total = sum(vector.double().sum().item() for vector in vectors)
            rows.append(
                {
                    'stage': stage,
                    'branch': branch,
                    'mean': total / sum(vector.numel() for vector in vectors),
                    'min': min(vector.min().item() for vector in vectors),
                    'max': max(vector.max().item() for vector in vectors),
                }
            )
    return rows


def _stages(modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, list[Mapping[str, Tensor]]]:
    stages: dict[str, list[Mapping[str, Tensor]]] = {}
    for module in modules:
        match = re.match(r'stages[._](\d+)', module)
        name = f'stage {int(match[1]) + 1}' if match else module.split('.')[0]
        stages.setdefault(name, []).append(modules[module])
    return stages
