"""Pictures of trials: accuracy against epochs, wall time and depth, and differences with their intervals."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..plot import save_figure, subplots
from .arms import ARMS, in_order
from .results import TrialResult

__all__ = ['draw_trial', 'draw_trials']

# The first are those of `ARMS`, the others those of given scales.
_COLORS = (*(f'C{place}' for place in range(10)), 'k', 'gold', 'navy', 'lime', 'maroon', 'teal')
_MARKERS = 'os^DvPX<>p*hd'

# Lines and fillings of markers, for each number of epochs.
_BUDGETS: list[tuple[Any, str]] = [
    ('-', 'full'),
    ('--', 'none'),
    (':', 'left'),
    ('-.', 'bottom'),
    ((0, (5, 1, 1, 1, 1, 1)), 'top'),
]


def _styles(arms: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns arm to color and marker; those of `ARMS` look alike in all pictures."""
    arms = in_order(arms)
    places = {arm: place for place, arm in enumerate([*ARMS, *(arm for arm in arms if arm not in ARMS)])}
    return {
        arm: {'color': _COLORS[places[arm] % len(_COLORS)], 'marker': _MARKERS[places[arm] % len(_MARKERS)]}
        for arm in arms
    }


def draw_trial(result: TrialResult, path: Path) -> None:
    """Draws mean accuracy and range over seeds against epochs and against wall time, and differences with intervals.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure, (epochs, times, differences) = subplots(1, 3, (14, 4), layout='constrained')
    styles = _styles(result.choices)
    for arm, rows in result.epochs.dropna(subset='eval_top1').groupby('arm', sort=False):
        curve = rows.groupby('epoch')['eval_top1'].agg(['mean', 'min', 'max'])
        for axes, x in ((epochs, curve.index), (times, result.seconds(arm, curve.index))):
            if not np.isnan(x).any():
                axes.plot(x, curve['mean'], **styles[arm], ms=5, markevery=max(1, len(curve) // 8), label=arm)
                axes.fill_between(x, curve['min'], curve['max'], color=styles[arm]['color'], alpha=0.12)
    epochs.set(xlabel='epoch', ylabel='top-1 accuracy on validation images (%)', title='mean and range over seeds')
    epochs.xaxis.get_major_locator().set_params(integer=True)
    if epochs.lines:
        figure.legend(*epochs.get_legend_handles_labels(), loc='outside right upper', frameon=False)
    times.set(xlabel='seconds of training', title='the same against wall time')
    others = [arm for arm in result.choices if arm != result.reference]
    for place, arm in enumerate(others):
        interval = result.difference(arm)
        half = interval.half if interval.count > 1 else 0
        differences.errorbar(interval.mean, -place, xerr=half, **styles[arm], capsize=4)
    differences.set(
        yticks=[-place for place in range(len(others))],
        yticklabels=others,
        xlabel=f'points of top-1 against {result.reference}',
        title='paired differences, 95 % intervals',
    )
    differences.axvline(0, color='0.6', lw=1)
    save_figure(figure, path)


def draw_trials(results: Sequence[TrialResult], path: Path) -> Any:
    """Draws accuracy with 95 % intervals against the wall time of a run, and the number of convolutions if that varies.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    lines: dict[tuple[str, int], list[TrialResult]] = {}
    for result in sorted(results, key=lambda result: result.convolutions):
        for arm in result.choices:
            if result.mean(arm).count:
                lines.setdefault((arm, result.length), []).append(result)
    depths = sorted({result.convolutions for members in lines.values() for result in members})
    panels = 2 if len(depths) > 1 else 1
    figure, axes = subplots(1, panels, (1.5 + 5.25 * panels, 4.5), layout='constrained', squeeze=False)
    times, deep = axes[0, -1], axes[0, 0]
    budgets, styles = sorted({epochs for _, epochs in lines}), _styles(arm for arm, _ in lines)
    looks = {budget: _BUDGETS[place % len(_BUDGETS)] for place, budget in enumerate(budgets)}
    seconds = [result.seconds(arm) for (arm, _), members in lines.items() for result in members]
    for (arm, epochs), members in lines.items():
        line, fill = looks[epochs]
        means = [result.mean(arm) for result in members]
        bars = {'yerr': [mean.half if mean.count > 1 else 0 for mean in means], 'fillstyle': fill, 'capsize': 3}
        bars |= {'y': [mean.mean for mean in means], **styles[arm]}
        # Beside each other, so that no error bar hides another.
        place = list(styles).index(arm) - (len(styles) - 1) / 2
        aside = (max(seconds) / min(seconds)) ** (0.012 * place)
        times.errorbar([aside * result.seconds(arm) for result in members], ls='', **bars)
        if panels > 1:
            aside = 0.008 * depths[-1] * place
            deep.errorbar([result.convolutions + aside for result in members], ls=line, **bars)
    deep.set(ylabel='top-1 accuracy on validation images (%)', title='mean, 95 % interval')
    times.set(xlabel='seconds of training of a run (arms beside each other)', xscale='log')
    if panels > 1:
        deep.set(xlabel='convolutions', xticks=depths)
    for axis in (times.xaxis.set_major_formatter, times.xaxis.set_minor_formatter):
        axis(lambda value, _: f'{value:g}' if f'{value:g}'[0] in '1235' else '')
    for arm, style in styles.items():
        times.plot([], [], ls='', **style, label=arm)
    for budget, (line, fill) in looks.items():
        times.plot([], [], 'o', ls=line if panels > 1 else '', fillstyle=fill, color='0.3', label=f'{budget} epochs')
    if lines:
        figure.legend(loc='outside right upper', frameon=False)
    save_figure(figure, path)
    return figure
