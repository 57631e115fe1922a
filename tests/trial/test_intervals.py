import math

import pytest

from repopt_timm.trial.intervals import Interval, seeds_to_show


def test_an_interval_is_as_wide_as_few_values_demand():
    interval = Interval.of([1.0, 2.0, 3.0, math.nan])
    assert (interval.mean, interval.count) == (2, 3)
    assert interval.half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert not interval.excludes_zero and Interval.of([1.0, 1.1, 1.2]).excludes_zero


def test_the_number_of_seeds_is_that_of_tables_of_the_t_test():
    # Differences as large as their standard deviation take 10 pairs, half as large ones 34.
    assert seeds_to_show(1.0, Interval.of([1 - 2**-0.5, 1 + 2**-0.5]))[0] == 10
    assert seeds_to_show(0.5, Interval.of([1 - 2**-0.5, 1 + 2**-0.5]))[0] == 34


def test_two_seeds_leave_more_of_the_spread_open_than_many():
    few, many = (seeds_to_show(2.0, Interval.of([0.0, 4.0] * pairs)) for pairs in (1, 10))
    assert few[1] > 5 * few[0] and many[1] < 2 * many[0]
