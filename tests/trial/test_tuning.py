import math

import pytest

from repopt_timm.trial.tuning import MOST_BEYOND, Choice, choose_rate, is_guessing

GRID = (0.05, 0.1, 0.2)


@pytest.mark.parametrize(
    ('scores', 'choice'),
    [
        ({}, Choice(GRID)),
        ({0.05: 1, 0.1: 3}, Choice((0.2,))),
        ({0.05: 1, 0.1: 3, 0.2: 2}, Choice((), 0.1)),
        ({0.05: 1, 0.1: 3, 0.2: 3}, Choice((), 0.1)),
        # A best value at the edge widens the grid in its own steps.
        ({0.05: 1, 0.1: 2, 0.2: 3}, Choice((0.4,))),
        ({0.05: 3, 0.1: 2, 0.2: 1}, Choice((0.025,))),
        ({0.05: 1, 0.1: 2, 0.2: 3, 0.4: 2}, Choice((), 0.2)),
        # A run that diverged is never the best.
        ({0.05: 1, 0.1: 2, 0.2: math.nan}, Choice((), 0.1)),
        ({0.05: math.nan, 0.1: math.nan, 0.2: math.nan}, Choice((0.025,))),
    ],
)
def test_the_best_learning_rate_is_inside_the_grid(scores, choice):
    assert choose_rate(GRID, scores) == choice


@pytest.mark.parametrize('grid', [(1.0, 1.001), (1.0, 1.01), (0.0999, 0.1)])
def test_a_value_that_was_tried_is_not_tried_again(grid):
    scores = {lr: lr for lr in grid}
    for _ in range(MOST_BEYOND + 1):
        missing = choose_rate(grid, scores).missing
        assert not set(missing) & set(scores)
        scores |= {lr: lr for lr in missing}
    assert not choose_rate(grid, scores).missing


def test_a_single_value_is_compared_with_its_double_and_half():
    assert choose_rate((0.1,), {0.1: 5}) == Choice((0.05, 0.2))


@pytest.mark.parametrize(('accuracy', 'best'), [(lambda lr: lr, 1.6), (lambda lr: math.nan, None)])
def test_the_grid_grows_so_far_and_no_farther(accuracy, best):
    scores = {}
    while (choice := choose_rate(GRID, scores)).missing:
        scores |= {lr: accuracy(lr) for lr in choice.missing}
    assert choice == Choice((), best, at_edge=True)
    assert len(scores) == len(GRID) + MOST_BEYOND


@pytest.mark.parametrize(
    ('top1', 'classes', 'images', 'guess'),
    [
        # Of 94 convolutions under plain SGD.
        (10.62, 10, 5000, True),
        (9.88, 10, 5000, True),
        (15.7, 10, 5000, False),
        (15.7, 10, 50, True),
        (50.0, 2, 5000, True),
        (2.0, 1000, 100_000, False),
        (math.nan, 10, 5000, False),
    ],
)
def test_the_best_of_some_guesses_is_a_guess(top1, classes, images, guess):
    assert is_guessing(top1, classes, images) == guess
