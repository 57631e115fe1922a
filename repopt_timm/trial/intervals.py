"""Student's t: intervals of means of few values."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ['Interval', 'student_cdf', 'student_quantile']


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
        return cls(mean, student_quantile(0.975, len(values) - 1) * error, len(values))

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


def student_cdf(value: float, freedom: int) -> float:
    """Returns the probability that Student's t is below a value.

    The sums over powers of the cosine for whole degrees of freedom, 26.7.3 and 26.7.4 of Abramowitz and Stegun.

    Args:
        value: The value.
        freedom: Degrees of freedom, at least 1.
    """
    angle = math.atan(value / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for index in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (index - 1) / index
        total += term
    total *= math.sin(angle)
    within = (angle + total * (freedom > 1)) * 2 / math.pi if odd else total
    return (1 + within) / 2


def student_quantile(probability: float, freedom: int) -> float:
    """Returns the value below which Student's t is with a probability of at least one half; see `student_cdf`."""
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if student_cdf(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return high
