import math

import pytest

from repopt_timm.trial.intervals import Interval, student_cdf, student_quantile


@pytest.mark.parametrize(
    ('freedom', 'quantile'),
    # The table of percentage points of Student's t, 97.5 %.
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantiles_are_those_of_the_table(freedom, quantile):
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=5e-4)


def test_the_distribution_is_symmetric():
    assert student_cdf(0, 3) == 0.5
    assert student_cdf(1.3, 4) + student_cdf(-1.3, 4) == pytest.approx(1)


def test_an_interval_is_as_wide_as_few_values_demand():
    interval = Interval.of([1.0, 2.0, 3.0])
    assert (interval.mean, interval.count) == (2, 3)
    assert interval.half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-3)
    assert not interval.excludes_zero and Interval.of([1.0, 1.1, 1.2]).excludes_zero


def test_one_value_says_nothing_of_the_spread():
    assert Interval.of([5.0]) == Interval(5.0, math.inf, 1)
    assert not Interval.of([5.0]).excludes_zero
    assert Interval.of([]).count == 0
