"""The choice of a learning rate: a grid that grows where its best value is at the edge."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ['MOST_BEYOND', 'Choice', 'choose_rate', 'is_guessing']

MOST_BEYOND = 3
"""Number of values beyond each end of the grid that are tried at most."""


@dataclass(frozen=True)
class Choice:
    """What is known of an arm's learning rate.

    Attributes:
        missing: Values to try next; none once the choice is made.
        best: The best value; None before the choice is made, and if every run diverged.
        at_edge: Whether the best value is the lowest or highest tried, so that a better one may lie beyond.
    """

    missing: tuple[float, ...]
    best: float | None = None
    at_edge: bool = False


def choose_rate(grid: Sequence[float], scores: Mapping[float, float]) -> Choice:
    """Chooses the learning rate with the highest accuracy, the lower of equal ones.

    Args:
        grid: Values to begin with.
        scores: Value to accuracy; NaN for a run that diverged.
    """
    if missing := tuple(value for value in grid if value not in scores):
        return Choice(missing)
    tried = sorted(scores)
    works = {value: score for value, score in scores.items() if not math.isnan(score)}
    best = min(works, key=lambda value: (-works[value], value)) if works else tried[0]
    beyond = []
    if best == tried[0] and sum(value < min(grid) for value in tried) < MOST_BEYOND:
        beyond.append(_next(tried[0], tried[1] if len(tried) > 1 else 2 * tried[0]))
    if best == tried[-1] and works and sum(value > max(grid) for value in tried) < MOST_BEYOND:
        beyond.append(_next(tried[-1], tried[-2] if len(tried) > 1 else tried[-1] / 2))
    # Rounded, a value may be one that was tried.
    if missing := tuple(value for value in beyond if value not in scores):
        return Choice(missing)
    return Choice((), best if works else None, best in (tried[0], tried[-1]))


def is_guessing(top1: float, classes: int, images: int) -> bool:
    """Returns whether a network that guesses may reach an accuracy, in percent, as the best of some learning rates.

    Of nine guesses the best is more than two standard errors above chance in one of five cases, more than three in one
    of eighty.
    """
    share = 1 / classes
    return top1 / 100 <= share + 3 * math.sqrt(share * (1 - share) / images)


def _next(edge: float, neighbour: float) -> float:
    # As it is written in a folder's name.
    return float(f'{edge * edge / neighbour:.3g}')
