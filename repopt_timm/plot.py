"""Pictures: scales against depth, and training curves."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import replacing


def subplots(rows: int, columns: int, figsize: tuple[float, float], layout: Any = None, **options: Any) -> Any:
    """Returns a figure and its axes, as `matplotlib.pyplot.subplots` does, whose state and backend are the user's."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("Pictures need matplotlib: pip install 'repopt-timm[plot]'.") from None
    figure = Figure(figsize=figsize, layout=layout)
    return figure, figure.subplots(rows, columns, **options)


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Writes a figure in the format that the path's suffix names, whole or not at all."""
    target = Path(path)
    if target.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"'{path}' does not end in the suffix of a picture, such as {target.stem}.png.")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches='tight')


def plot_scales(
    scales: Mapping[str, Mapping[str, Tensor]],
    path: str | os.PathLike,
    title: str = '',
    initial: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Any:
    """Draws mean and range over the channels of each branch's scale against depth, and returns the figure."""
    figure, axes = subplots(1, 1, (9, 4))
    branches = sorted({branch for vectors in scales.values() for branch in vectors}, reverse=True)
    for branch in branches:
        found = {depth: vectors[branch] for depth, vectors in enumerate(scales.values()) if branch in vectors}
        means, lowest, highest = (
            [measure(vector).item() for vector in found.values()] for measure in (Tensor.mean, Tensor.min, Tensor.max)
        )
        # Branches may lie on top of each other, as they do before a search.
        width = 2.5 if branch == branches[0] else 1
        color = axes.plot([*found], means, 'o-', label=branch, lw=width, ms=2 * width)[0].get_color()
        axes.vlines([*found], lowest, highest, color=color, alpha=0.4)
        starts = enumerate((initial or {}).get(module, {}) for module in scales)
        began = {depth: vectors[branch].mean().item() for depth, vectors in starts if branch in vectors}
        # Scales that were not searched are their own initial values: one set of points is enough.
        if began and [*began.values()] != means:
            axes.plot([*began], [*began.values()], '_', color=color, ms=9, label=f'{branch}, initial')
    axes.set(title=title, xlabel='convolution, from the stem on', ylabel='scale: mean, and range over channels')
    axes.legend(frameon=False)
    save_figure(figure, path)
    return figure


def plot_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], path: str | os.PathLike) -> Any:
    """Draws training loss and top-1 accuracy of runs against epochs, and returns the figure.

    A run's rows have `epoch`, `train_loss` and, if it was evaluated, `eval_top1` in percent.
    """
    figure, (left, right) = subplots(1, 2, (10, 3.8))
    for name, rows in histories.items():
        for axes, column in ((left, 'train_loss'), (right, 'eval_top1')):
            measured = [row for row in rows if column in row]
            axes.plot([row['epoch'] + 1 for row in measured], [row[column] for row in measured], label=name)
    left.set(xlabel='epoch', ylabel='training loss')
    right.set(xlabel='epoch', ylabel='top-1 accuracy on held-out images (%)')
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
    save_figure(figure, path)
    return figure
