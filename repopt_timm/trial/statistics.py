"""Statistics of a few runs: the best learning rate, the interval of a mean, and whether a network only guesses."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2, nct, sem, t

# Values beyond each end of a grid that are tried at most.
MOST_BEYOND = 3

_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Choice:
    """What is known of an arm's learning rate: the values to try next, or else the best, None if all diverged."""

    missing: tuple[float, ...]
    best: float | None = None
    at_edge: bool = False


def choose_rate(grid: Sequence[float], scores: Mapping[float, float]) -> Choice:
    """Chooses the value with the highest score, the lower of equal ones; the score of a run that diverged is NaN."""
    if missing := tuple(value for value in grid if value not in scores):
        return Choice(missing)
    tried = sorted(scores)
    works = [value for value in tried if not math.isnan(scores[value])]
    best = max(works, key=lambda value: scores[value]) if works else tried[0]
    beyond = []
    if best == tried[0] and tried.index(min(grid)) < MOST_BEYOND:
        beyond.append(tried[0] ** 2 / tried[1] if len(tried) > 1 else tried[0] / 2)
    if works and best == tried[-1] and tried[::-1].index(max(grid)) < MOST_BEYOND:
        beyond.append(tried[-1] ** 2 / tried[-2] if len(tried) > 1 else 2 * tried[-1])
    # As they are written in a folder's name, where they may be values that were tried.
    if missing := tuple(value for each in beyond if (value := float(f'{each:.3g}')) not in scores):
        return Choice(missing)
    return Choice((), best if works else None, bool(works) and best in (tried[0], tried[-1]))


@dataclass(frozen=True)
class Interval:
    """The mean of `count` values (NaN if there are none) and half the width of its 95 % confidence interval.

    The half width is infinite for one value.
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
        return self.lower > 0 or self.upper < 0

    @property
    def bar(self) -> float:
        """Half of the interval in a picture: 0 for a single value."""
        return self.half if self.count > 1 else 0.0

    def text(self, sign: str = '+') -> str:
        """Formats the mean with its interval, such as `+1.20 (0.30 to 2.10)`; `-` without a value."""
        if not self.count:
            return '-'
        mean = f'{self.mean:{sign}.2f}'
        return mean if self.count == 1 else f'{mean} ({self.lower:.2f} to {self.upper:.2f})'


def seeds_to_show(points: float, interval: Interval) -> tuple[int, int]:
    """Estimates how many paired seeds show a true difference of `points` in four of five trials, by the t-test at 5 %.

    The first number is for the observed spread, the second for its upper limit at 80 %; either is 1000 at most.
    """
    degrees = interval.count - 1
    deviation = interval.half * math.sqrt(interval.count) / t.ppf(0.975, degrees)
    largest = deviation * math.sqrt(degrees / chi2.ppf(0.2, degrees))

    def needed(spread: float) -> int:
        counts = np.arange(2, _MOST_SEEDS)
        power = nct.sf(t.ppf(0.975, counts - 1), counts - 1, points * np.sqrt(counts) / spread)
        return int(counts[power >= 0.8].min(initial=_MOST_SEEDS))

    return needed(deviation), needed(largest)


def is_guessing(top1: float, classes: int, images: int) -> bool:
    """Returns whether a network that guesses may reach an accuracy, in percent, as the best of some learning rates.

    Of nine guesses the best is over two standard errors above chance in one of five cases, over three in one of eighty.
    """
    share = 1 / classes
    return top1 / 100 <= share + 3 * math.sqrt(share * (1 - share) / images)
