"""Pictures of trials: accuracy against epochs, wall time and depth, and differences with their intervals."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..plot import save_figure, subplots
from .arms import ARMS, in_order
from .results import TrialResult

# The first are those of `ARMS`, the others those of given scales.
_COLORS = (*(f'C{place}' for place in range(10)), 'k', 'gold', 'navy', 'lime', 'maroon', 'teal')
_MARKERS = 'os^DvPX<>p*hd'

# For each number of epochs.
_LINES, _FILLS = ('-', '--', ':', '-.'), ('full', 'none', 'left', 'bottom')


def _styles(arms: Collection[str]) -> dict[str, dict[str, Any]]:
    """Returns arm to color and marker; those of `ARMS` look alike in all pictures."""
    return {
        arm: {'color': _COLORS[place % len(_COLORS)], 'marker': _MARKERS[place % len(_MARKERS)]}
        for place, arm in enumerate(dict.fromkeys([*ARMS, *arms]))
        if arm in arms
    }


def draw_trial(result: TrialResult, path: Path) -> None:
    """Draws mean accuracy and range over seeds against epochs and wall time, and differences with intervals."""
    figure, (epochs, times, differences) = subplots(1, 3, (14, 4), layout='constrained')
    styles = _styles(result.arms)
    for name, rows in result.epochs.dropna(subset='eval_top1').groupby('arm', sort=False):
        curve = rows.groupby('epoch')['eval_top1'].agg(['mean', 'min', 'max'])
        for axes, x in ((epochs, curve.index), (times, result.arms[name].seconds_of(curve.index))):
            axes.plot(x, curve['mean'], **styles[name], ms=5, markevery=max(1, len(curve) // 8), label=name)
            axes.fill_between(x, curve['min'], curve['max'], color=styles[name]['color'], alpha=0.12)
    epochs.set(xlabel='epoch', ylabel='top-1 accuracy on validation images (%)', title='mean and range over seeds')
    epochs.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*epochs.get_legend_handles_labels(), loc='outside right upper', frameon=False)
    times.set(xlabel='seconds of training', title='the same against wall time')
    others = [name for name in result.arms if name != result.reference]
    for place, name in enumerate(others):
        interval = result.arms[name].difference
        differences.errorbar(interval.mean, -place, xerr=interval.bar, **styles[name], capsize=4)
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

    Returns the figure.
    """
    table = pd.DataFrame(
        [
            (result.convolutions, arm.name, arm.length, arm.seconds, arm.mean.mean, arm.mean.bar)
            for result in results
            for arm in result.arms.values()
            if arm.mean.count
        ],
        columns=['depth', 'arm', 'epochs', 'seconds', 'mean', 'bar'],
    ).sort_values('depth', kind='stable')
    depths, budgets = sorted(table['depth'].unique()), sorted(table['epochs'].unique())
    styles = _styles(in_order(table['arm']))
    panels = 2 if len(depths) > 1 else 1
    figure, axes = subplots(1, panels, (1.5 + 5.25 * panels, 4.5), layout='constrained', squeeze=False)
    times, deep = axes[0, -1], axes[0, 0]
    for (name, epochs), rows in table.groupby(['arm', 'epochs'], sort=False):
        budget, place = budgets.index(epochs) % 4, list(styles).index(name) - (len(styles) - 1) / 2
        bars = {'y': rows['mean'], 'yerr': rows['bar'], 'capsize': 3, 'fillstyle': _FILLS[budget], **styles[name]}
        # Beside each other, so that no error bar hides another.
        aside = (table['seconds'].max() / table['seconds'].min()) ** (0.012 * place)
        times.errorbar(aside * rows['seconds'], ls='', **bars)
        if panels > 1:
            deep.errorbar(rows['depth'] + 0.008 * depths[-1] * place, ls=_LINES[budget], **bars)
    deep.set(ylabel='top-1 accuracy on validation images (%)', title='mean, 95 % interval')
    times.set(xlabel='seconds of training of a run (arms beside each other)', xscale='log')
    if panels > 1:
        deep.set(xlabel='convolutions', xticks=depths)
    for axis in (times.xaxis.set_major_formatter, times.xaxis.set_minor_formatter):
        axis(lambda value, _: f'{value:g}' if f'{value:g}'[0] in '1235' else '')
    for name, style in styles.items():
        times.plot([], [], ls='', **style, label=name)
    for epochs, line, fill in zip(budgets, _LINES * 9, _FILLS * 9):
        times.plot([], [], 'o', ls=line if panels > 1 else '', fillstyle=fill, color='0.3', label=f'{epochs} epochs')
    figure.legend(*times.get_legend_handles_labels(), loc='outside right upper', frameon=False)
    save_figure(figure, path)
    return figure
