"""Intervals of means of few values, from Student's t."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t

__all__ = ['Interval']


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
    def of(cls, values: Sequence[float]) -> 'Interval':
        """Computes the interval of values that vary independently around one mean."""
        if not values:
            return cls(math.nan, math.inf, 0)
        mean = statistics.fmean(values)
        if len(values) == 1:
            return cls(mean, math.inf, 1)
        error = statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean, float(t.ppf(0.975, len(values) - 1)) * error, len(values))

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
