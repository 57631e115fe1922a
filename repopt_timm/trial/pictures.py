"""Pictures of trials: accuracy against wall time and depth, and differences with their intervals."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..plot import save_figure, subplots
from .arms import ARMS, in_order
from .results import TrialResult

_MARKERS = 'os^DvPX<>p*hd'

# For each number of epochs.
_LINES = ('-', '--', ':', '-.')


def _styles(arms: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns arm to color and marker; the arms of `ARMS` look alike in all pictures."""
    names = list(dict.fromkeys([*ARMS, *arms]))
    return {name: {'color': f'C{place}', 'marker': _MARKERS[place % len(_MARKERS)]} for place, name in enumerate(names)}


def draw_trial(result: TrialResult, path: Path) -> None:
    """Draws mean accuracy and range over seeds against wall time, and differences with intervals."""
    figure, (times, differences) = subplots(1, 2, (11, 4), layout='constrained')
    styles = _styles(result.arms)
    for name, rows in result.epochs.dropna(subset='eval_top1').groupby('arm', sort=False):
        curve = rows.groupby('epoch')['eval_top1'].agg(['mean', 'min', 'max'])
        seconds = result.arms[name].seconds_of(curve.index)
        times.plot(seconds, curve['mean'], **styles[name], ms=5, markevery=max(1, len(curve) // 8), label=name)
        times.fill_between(seconds, curve['min'], curve['max'], color=styles[name]['color'], alpha=0.12)
    times.set(
        xlabel='seconds of training',
        ylabel='top-1 accuracy on validation images (%)',
        title='mean and range over seeds',
    )
    figure.legend(*times.get_legend_handles_labels(), loc='outside right upper', frameon=False)
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
            (result.convolutions, arm.seconds, arm.name, arm.length, arm.mean.mean, arm.mean.bar)
            for result in results
            for arm in result.arms.values()
            if arm.mean.count
        ],
        columns=['convolutions', 'seconds of training of a run', 'arm', 'epochs', 'mean', 'bar'],
    ).sort_values('convolutions', kind='stable')
    columns = list(table.columns[:2] if table['convolutions'].nunique() > 1 else table.columns[1:2])
    figure, axes = subplots(1, len(columns), (2 + 5 * len(columns), 4.5), layout='constrained', squeeze=False)
    names, budgets = in_order(table['arm']), sorted(table['epochs'].unique())
    styles = _styles(names)
    for (name, epochs), rows in table.groupby(['arm', 'epochs'], sort=False):
        line = {'ls': _LINES[budgets.index(epochs) % len(_LINES)], 'label': f'{name}, {epochs} epochs', **styles[name]}
        for each, column in zip(axes[0], columns):
            # Beside each other, so that no error bar hides another.
            aside = 0.008 * table[column].max() * (names.index(name) - (len(names) - 1) / 2)
            each.errorbar(rows[column] + aside, rows['mean'], rows['bar'], capsize=3, **line)
            each.set(xlabel=f'{column} (arms beside each other)')
    axes[0, 0].set(ylabel='top-1 accuracy on validation images (%)', title='mean, 95 % interval')
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside right upper', frameon=False)
    save_figure(figure, path)
    return figure
