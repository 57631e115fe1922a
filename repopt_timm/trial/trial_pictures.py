"""Pictures of trials: accuracy against epochs and wall time, and differences with their intervals."""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..plot import save_figure, subplots
from .arms import ARMS, in_order
from .intervals import Interval
from .results import ArmResult, TrialResult

__all__ = ['colors_of', 'draw_trial', 'error_bar']


# For given scales, which have names of their own.
_MORE_COLORS = ('C7', 'C8', 'C9', 'k', 'gold', 'navy', 'lime')


def colors_of(arms: Iterable[str]) -> dict[str, str]:
    """Returns arm to color, the same in all pictures but for given scales."""
    named = [name for name in in_order(arms) if name not in ARMS]
    more = {name: _MORE_COLORS[place % len(_MORE_COLORS)] for place, name in enumerate(named)}
    return {name: f'C{place}' for place, name in enumerate(ARMS)} | more


def draw_trial(trial: TrialResult, path: Path) -> Any:
    """Draws mean accuracy and range over seeds against epochs and against wall time, and differences with intervals.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure, (epochs, times, differences) = subplots(1, 3, (14, 4), layout='constrained')
    colors = colors_of(trial.arms)
    for arm in trial.arms.values():
        curve = _curve(arm)
        if not curve:
            continue
        color = colors[arm.name]
        for axes, x in ((epochs, list(curve)), (times, [arm.seconds(epoch) for epoch in curve])):
            if math.isnan(x[0]):
                continue
            axes.plot(x, [statistics.fmean(values) for values in curve.values()], color=color, label=arm.name)
            low, high = ([end(values) for values in curve.values()] for end in (min, max))
            axes.fill_between(x, low, high, color=color, alpha=0.15)
    epochs.set(xlabel='epoch', ylabel='top-1 accuracy on validation images (%)', title='mean and range over seeds')
    epochs.xaxis.get_major_locator().set_params(integer=True)
    if epochs.lines:
        epochs.legend(frameon=False)
    times.set(xlabel='seconds of training', title='the same against wall time')
    others = [name for name in trial.arms if name != trial.settings.reference]
    for place, name in enumerate(others):
        interval = trial.difference(name)
        if interval.count:
            error_bar(differences, interval, -place, colors[name])
    differences.set(
        yticks=[-place for place in range(len(others))],
        yticklabels=others,
        xlabel=f'points of top-1 against {trial.settings.reference}',
        title='paired differences, 95 % intervals',
    )
    differences.axvline(0, color='0.6', lw=1)
    save_figure(figure, path)
    return figure


def error_bar(axes: Any, interval: Interval, place: float, color: str) -> None:
    """Draws a mean and, of two values and more, its interval, lying at a height."""
    half = interval.half if interval.count > 1 else 0
    axes.errorbar([interval.mean], [place], xerr=[half], fmt='o', color=color, capsize=4)


def _curve(arm: ArmResult) -> dict[int, Sequence[float]]:
    """Returns epoch to the accuracies of all runs that reached it."""
    found: dict[int, list[float]] = {}
    for outcome in arm.outcomes.values():
        for row in outcome.history:
            if 'eval_top1' in row:
                found.setdefault(int(row['epoch']), []).append(row['eval_top1'])
    return dict(sorted(found.items()))
