"""Pictures of benchmarks."""

import os
from collections.abc import Sequence
from typing import Any

from ..plot import save_figure, subplots
from .memory import CARDS, RESERVE
from .rows import Row
from .scaling import AXES

__all__ = ['plot_memory', 'plot_ratios', 'plot_scaling']

_GIB = 2**30
_REACHED = {True: 'tab:green', False: 'tab:red', None: 'tab:gray'}
_COLORS = ('tab:gray', 'tab:blue', 'tab:orange')


def plot_ratios(rows: Sequence[Row], path: str | os.PathLike, title: str) -> None:
    """Draws ratios with their quartiles, and goals, of times on the left and of memory on the right.

    Args:
        rows: Results; baselines and rows without a ratio are not drawn.
        path: Picture to write, in the format that its suffix names.
        title: Text above the picture.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    shown = [row for row in rows if row.ratio is not None and row.contender != row.baseline]
    panels = [[row for row in shown if row.unit == unit] for unit in ('s', 'B')]
    panels = [panel for panel in panels if panel]
    height = max(len(panel) + 1.4 * len({row.what for row in panel}) for panel in panels)
    figure, all_axes = subplots(
        1, len(panels), figsize=(8.5 * len(panels), 1.2 + 0.3 * height), squeeze=False, layout='constrained'
    )
    for axes, panel in zip(all_axes[0], panels):
        _draw_ratios(axes, panel)
        axes.set_ylim(height + 0.7, 0.4)
    _save(figure, path, title)


def _save(figure: Any, path: str | os.PathLike, title: str) -> None:
    figure.suptitle(title, x=0.01, ha='left')
    save_figure(figure, path)


def _draw_ratios(axes: Any, rows: Sequence[Row]) -> None:
    place, labels, previous = 0.0, [], None
    style = {'transform': axes.get_yaxis_transform(), 'va': 'center'}
    for row in rows:
        assert row.ratio is not None
        if row.what != previous:
            place += 1.4
            axes.text(0.01, place, f'{row.what} (1 is {row.baseline})', fontsize='small', **style)
            previous = row.what
        place += 1
        labels.append((place, row.contender))
        middle = row.ratio.median
        error = [[middle - row.ratio.lower], [row.ratio.upper - middle]]
        axes.errorbar(middle, place, xerr=error, fmt='o', color=_REACHED[row.reached], capsize=3)
        axes.text(1.01, place, f'{middle:.2f}', **style)
        if row.goal is not None and not row.goal.of_value:
            ends = [end for end in (row.goal.least, row.goal.most) if end is not None]
            axes.vlines(ends, place - 0.4, place + 0.4, color='black', lw=2)
    axes.axvline(1, color='0.8', lw=1, zorder=0)
    axes.set_xlim(0, 1.05 * max(1.0, *(row.ratio.upper for row in rows if row.ratio is not None)))
    axes.set_yticks([at for at, _ in labels], [name for _, name in labels])
    kind = 'time' if rows[0].unit == 's' else 'memory'
    axes.set_xlabel(f'{kind}: median ratio with quartiles; black: goal; green: reached, red: missed')


def plot_scaling(rows: Sequence[Row], path: str | os.PathLike, title: str) -> None:
    """Draws step time and peak memory against width, depth, batch and resolution; arguments as in `plot_ratios`."""
    figure, all_axes = subplots(2, len(AXES), figsize=(4 * len(AXES), 6.5), layout='constrained')
    labels = {'width': 'factor for the width', 'depth': 'factor for the depth', 'batch': 'images in the batch'}
    kinds = (('step time', 's', 1.0, 'time of a step (s)'), ('peak memory', 'B', _GIB, 'peak memory of a step (GiB)'))
    for line, (kind, unit, size, label) in zip(all_axes, kinds):
        for axes, axis in zip(line, AXES):
            found = [row for row in rows if row.what == f'{kind} against {axis}' and row.unit == unit]
            _draw_lines(axes, found, size)
            axes.set_ylim(0, 1.08 * max((row.value for row in found), default=size) / size)
            axes.set_xlim(left=0)
            axes.set_xlabel(labels.get(axis, 'image size (px)'))
        line[0].set_ylabel(label)
    all_axes[0][0].legend(frameon=False)
    _save(figure, path, title)


def _draw_lines(axes: Any, rows: Sequence[Row], unit: float) -> None:
    for name, color in zip(dict.fromkeys(row.contender for row in rows), _COLORS):
        points = [(row.at, row.value / unit) for row in rows if row.contender == name]
        axes.plot(*zip(*points), marker='o', color=color, label=name)
    axes.grid(color='0.92')


def plot_memory(rows: Sequence[Row], path: str | os.PathLike, title: str) -> None:
    """Draws the peak memory of a step against the batch size, and what fits GPUs; arguments as in `plot_ratios`."""
    peaks = [row for row in rows if row.what.startswith('peak')]
    cells = list(dict.fromkeys(row.what.partition(', ')[2] for row in peaks))
    figure, all_axes = subplots(
        1, len(cells), figsize=(5.5 * len(cells), 4.5), squeeze=False, sharey=True, layout='constrained'
    )
    highest = max(row.value for row in peaks) / _GIB
    for axes, cell in zip(all_axes[0], cells):
        found = [row for row in peaks if row.what.endswith(cell)]
        _draw_lines(axes, found, _GIB)
        for card in CARDS:
            if (1 - RESERVE) * card < 1.3 * highest:
                axes.axhline((1 - RESERVE) * card, color='tab:red', lw=1, ls='--', zorder=0)
                axes.text(0, (1 - RESERVE) * card, f' {card} GB less {RESERVE:.0%}', va='bottom', color='tab:red')
        axes.set(title=cell, xlabel='images in the batch of one process', xlim=(0, None), ylim=(0, None))
    all_axes[0][0].set_ylabel('peak memory of a training step (GiB)')
    all_axes[0][-1].legend(frameon=False)
    _save(figure, path, title)
