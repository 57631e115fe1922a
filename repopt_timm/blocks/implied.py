"""The scales that trained branches imply: what each branch's BatchNorm multiplies its operator with."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..reparam import geometry_of, network_name
from ..scales import Scales
from .branch_sum import BranchSum
from .merged_weights import scale_of
from .plain_twin import convert

__all__ = ['implied_scales']

_logger = logging.getLogger(__name__)

# SGD multiplies gradients with the square: a channel may train a thousand times slower than a typical one.
_RANGE = 30.0


def implied_scales(model: nn.Module) -> Scales:
    """Reads the scales of a trained multi-branch network, to fine-tune its merged plain twin with a RepOptimizer.

    A branch counts with gamma / sigma of its BatchNorm in the sum, which is what the scale of a CSLA branch is. Equal
    branches share the root of their mean square, which gives the same Grad Mult under SGD. An identity's value is that
    of its operator, whose Grad Mult is 1. Dead and exploding channels are bounded: to a thirtieth and thirty times of
    what the strongest branch of a typical channel has. The provenance states how many were, the log in which branches.

    Args:
        model: Trained multi-branch network; it is not changed.

    Returns:
        Scales for `plain_twin(model, weights=True)`.

    Raises:
        ValueError: See `plain_twin`.
    """
    twin, sums, _ = convert(model)
    modules: dict[str, dict[str, Tensor]] = {}
    bounded = 0
    for name, source in sums.items():
        vectors = _vectors(source)
        scaled = {branch: vector for branch, vector in vectors.items() if branch != 'identity'}
        low, high = _bounds(scaled)
        for branch, vector in scaled.items():
            size = vector.abs()
            dead, exploding = int((size < low).sum()), int((size > high).sum())
            if dead + exploding:
                _logger.info(f"'{name}', branch {branch}: {dead} dead, {exploding} exploding channels are bounded.")
            bounded += dead + exploding
            vectors[branch] = torch.where(vector < 0, -1.0, 1.0) * size.clamp(low, high)
        modules[name] = vectors
    provenance = {'method': 'implied by trained branches', 'bounded_channels': bounded}
    counts = {name: source.counts for name, source in sums.items()}
    return Scales(network_name(twin), modules, geometry_of(twin, modules), counts, provenance, 'implied')


@torch.no_grad()
def _vectors(source: BranchSum) -> dict[str, Tensor]:
    vectors = {}
    for branch, count in source.counts.items():
        equal = [scale_of(part, source.kxk.weight) for part in source.parts if source.name_of(part) == branch]
        vectors[branch] = equal[0] if count == 1 else torch.stack(equal).square().mean(0).sqrt()
    return vectors


def _bounds(vectors: Mapping[str, Tensor]) -> tuple[float, float]:
    typical = torch.stack([vector.abs() for vector in vectors.values()]).amax(0).median().item() or 1.0
    return typical / _RANGE, typical * _RANGE
