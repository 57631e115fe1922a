import math

import pytest

from repopt_timm.trial.statistics import MOST_BEYOND, Choice, Interval, choose_rate, is_guessing, seeds_to_show

GRID = (0.05, 0.1, 0.2)


@pytest.mark.parametrize(
    ('scores', 'choice'),
    [
        ({}, Choice(GRID)),
        ({0.05: 1, 0.1: 3, 0.2: 3}, Choice((), 0.1)),
        # A best value at the edge widens the grid in its own steps.
        ({0.05: 1, 0.1: 2, 0.2: 3}, Choice((0.4,))),
        ({0.05: 3, 0.1: 2, 0.2: 1}, Choice((0.025,))),
        # A run that diverged is never the best.
        ({0.05: 1, 0.1: 2, 0.2: math.nan}, Choice((), 0.1)),
        ({0.05: math.nan, 0.1: math.nan, 0.2: math.nan}, Choice((0.025,))),
    ],
)
def test_the_best_learning_rate_is_inside_the_grid(scores, choice):
    assert choose_rate(GRID, scores) == choice


@pytest.mark.parametrize(
    ('grid', 'score', 'choice', 'tried'),
    [
        (GRID, lambda lr: lr, Choice((), 1.6, at_edge=True), 3 + MOST_BEYOND),
        (GRID, lambda lr: math.nan, Choice(()), 3 + MOST_BEYOND),
        ((0.1,), lambda lr: -abs(lr - 0.1), Choice((), 0.1), 3),
        # A value beyond that is, rounded, one that was tried.
        ((1.0, 1.001), lambda lr: lr, Choice((), 1.001, at_edge=True), 2),
    ],
)
def test_the_grid_grows_so_far_and_no_farther(grid, score, choice, tried):
    scores = {}
    while missing := choose_rate(grid, scores).missing:
        assert not set(missing) & set(scores)
        scores |= {lr: score(lr) for lr in missing}
    assert choose_rate(grid, scores) == choice and len(scores) == tried


@pytest.mark.parametrize(
    ('top1', 'classes', 'images', 'guess'),
    [
        # Of 94 convolutions under plain SGD.
        (10.62, 10, 5000, True),
        (15.7, 10, 50, True),
        (2.0, 1000, 100_000, False),
        (math.nan, 10, 5000, False),
    ],
)
def test_the_best_of_some_guesses_is_a_guess(top1, classes, images, guess):
    assert is_guessing(top1, classes, images) == guess


def test_an_interval_is_as_wide_as_few_values_demand():
    interval = Interval.of([1.0, 2.0, 3.0, math.nan])
    assert (interval.mean, interval.count) == (2, 3)
    assert interval.half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert not interval.excludes_zero and Interval.of([1.0, 1.1, 1.2]).excludes_zero


def test_the_number_of_seeds_is_that_of_tables_of_the_t_test():
    # Differences as large as their standard deviation take 10 pairs, half as large ones 34.
    pair = Interval.of([1 - 2**-0.5, 1 + 2**-0.5])
    assert (seeds_to_show(1.0, pair)[0], seeds_to_show(0.5, pair)[0]) == (10, 34)
    few, many = (seeds_to_show(2.0, Interval.of([0.0, 4.0] * pairs)) for pairs in (1, 10))
    assert few[1] > 5 * few[0] and many[1] < 2 * many[0]
