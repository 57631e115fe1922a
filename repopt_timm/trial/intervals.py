"""Intervals of means of few values, from Student's t, and how many values a narrower one takes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2, nct, sem, t

__all__ = ['Interval', 'seeds_to_show']

_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval.

    Attributes:
        mean: The mean; NaN of no values.
        half: Half of the interval's width; infinite for a single value, which says nothing of the spread.
        count: Number of values.
    """

    mean: float
    half: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> 'Interval':
        """Computes the interval of values that vary independently around one mean; NaNs do not count."""
        found = [value for value in values if not math.isnan(value)]
        if len(found) < 2:
            return cls(found[0] if found else math.nan, math.inf, len(found))
        half = t.ppf(0.975, len(found) - 1) * sem(found)
        return cls(float(np.mean(found)), float(half), len(found))

    @property
    def lower(self) -> float:
        return self.mean - self.half

    @property
    def upper(self) -> float:
        return self.mean + self.half

    @property
    def excludes_zero(self) -> bool:
        """Whether the mean differs from 0."""
        return self.lower > 0 or self.upper < 0


def seeds_to_show(points: float, interval: Interval) -> tuple[int, int]:
    """Estimates how many paired seeds show a difference in four of five trials, by the t-test at 5 %.

    Args:
        points: The true difference.
        interval: Interval of the differences of two seeds or more, which the spread is taken from.

    Returns:
        The number if the spread is the observed one, and if it is the most that the seeds leave likely (upper limit at
        80 %); 1000 at most.
    """
    degrees = interval.count - 1
    deviation = interval.half * math.sqrt(interval.count) / t.ppf(0.975, degrees)
    largest = deviation * math.sqrt(degrees / chi2.ppf(0.2, degrees))

    def needed(spread: float) -> int:
        for seeds in range(2, _MOST_SEEDS):
            power = nct.sf(t.ppf(0.975, seeds - 1), seeds - 1, points * math.sqrt(seeds) / spread)
            if power >= 0.8:
                return seeds
        return _MOST_SEEDS

    return needed(deviation), needed(largest)
