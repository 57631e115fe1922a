"""Pictures of trials: accuracy against epochs, wall time and depth, and differences with their intervals."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..plot import save_figure, subplots
from .arms import ARMS, in_order
from .results import TrialResult

__all__ = ['draw_trial', 'draw_trials']

# For given scales, which have names of their own.
_MORE_COLORS = ('k', 'gold', 'navy', 'lime')

# A marker and a line for each number of epochs.
_STYLES = ('o-', 's--', '^:', 'D-.')


def _colors(arms: Iterable[str]) -> dict[str, str]:
    """Returns arm to color, the same in all pictures but for given scales."""
    named = [name for name in in_order(arms) if name not in ARMS]
    more = {name: _MORE_COLORS[place % len(_MORE_COLORS)] for place, name in enumerate(named)}
    return {name: f'C{place}' for place, name in enumerate(ARMS)} | more


def draw_trial(result: TrialResult, path: Path) -> Any:
    """Draws mean accuracy and range over seeds against epochs and against wall time, and differences with intervals.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure, (epochs, times, differences) = subplots(1, 3, (14, 4), layout='constrained')
    colors = _colors(result.choices)
    for arm, rows in result.epochs.dropna(subset='eval_top1').groupby('arm', sort=False):
        curve = rows.groupby('epoch')['eval_top1'].agg(['mean', 'min', 'max'])
        for axes, x in ((epochs, curve.index), (times, result.seconds(arm, curve.index))):
            if not np.isnan(x).any():
                axes.plot(x, curve['mean'], color=colors[arm], label=arm)
                axes.fill_between(x, curve['min'], curve['max'], color=colors[arm], alpha=0.15)
    epochs.set(xlabel='epoch', ylabel='top-1 accuracy on validation images (%)', title='mean and range over seeds')
    epochs.xaxis.get_major_locator().set_params(integer=True)
    if epochs.lines:
        epochs.legend(frameon=False)
    times.set(xlabel='seconds of training', title='the same against wall time')
    others = [arm for arm in result.choices if arm != result.reference]
    for place, arm in enumerate(others):
        interval = result.difference(arm)
        half = interval.half if interval.count > 1 else 0
        differences.errorbar(interval.mean, -place, xerr=half, fmt='o', color=colors[arm], capsize=4)
    differences.set(
        yticks=[-place for place in range(len(others))],
        yticklabels=others,
        xlabel=f'points of top-1 against {result.reference}',
        title='paired differences, 95 % intervals',
    )
    differences.axvline(0, color='0.6', lw=1)
    save_figure(figure, path)
    return figure


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
    budgets, arms = sorted({epochs for _, epochs in lines}), in_order(arm for arm, _ in lines)
    colors = _colors(arms)
    seconds = [result.seconds(arm) for (arm, _), members in lines.items() for result in members]
    for (arm, epochs), members in lines.items():
        style = _STYLES[budgets.index(epochs) % len(_STYLES)]
        means = [result.mean(arm) for result in members]
        bars = {
            'y': [mean.mean for mean in means],
            'yerr': [mean.half if mean.count > 1 else 0 for mean in means],
            'color': colors[arm],
            'capsize': 3,
        }
        # Beside each other, so that no error bar hides another.
        place = arms.index(arm) - (len(arms) - 1) / 2
        aside = (max(seconds) / min(seconds)) ** (0.012 * place)
        times.errorbar([aside * result.seconds(arm) for result in members], fmt=style[0], **bars)
        if panels > 1:
            aside = 0.008 * depths[-1] * place
            deep.errorbar([result.convolutions + aside for result in members], fmt=style, **bars)
    deep.set(ylabel='top-1 accuracy on validation images (%)', title='mean, 95 % interval')
    times.set(xlabel='seconds of training of a run (arms beside each other)', xscale='log')
    if panels > 1:
        deep.set(xlabel='convolutions', xticks=depths)
    for axis in ('major', 'minor'):
        getattr(times.xaxis, f'set_{axis}_formatter')(
            lambda value, _: f'{value:g}' if f'{value:g}'[0] in '1235' else ''
        )
    for arm in arms:
        times.plot([], [], color=colors[arm], label=arm)
    for budget, style in zip(budgets, _STYLES):
        times.plot([], [], style if panels > 1 else style[0], color='0.3', label=f'{budget} epochs')
    if lines:
        figure.legend(loc='outside right upper', frameon=False)
    save_figure(figure, path)
    return figure
