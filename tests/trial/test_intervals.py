import math

import pytest

from repopt_timm.trial.intervals import Interval


def test_an_interval_is_as_wide_as_few_values_demand():
    interval = Interval.of([1.0, 2.0, 3.0])
    assert (interval.mean, interval.count) == (2, 3)
    assert interval.half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert not interval.excludes_zero and Interval.of([1.0, 1.1, 1.2]).excludes_zero


def test_one_value_says_nothing_of_the_spread():
    assert Interval.of([5.0]) == Interval(5.0, math.inf, 1)
    assert not Interval.of([5.0]).excludes_zero
    assert Interval.of([]).count == 0
