"""Pictures: scales against depth, and training curves."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import replacing

# The scales of kxk and 1x1 may lie on top of each other, as they do before a search.
_STYLES = {
    'kxk': {'color': 'tab:blue', 'marker': 's', 'ms': 6, 'lw': 2.5, 'alpha': 0.6},
    '1x1': {'color': 'tab:red', 'marker': 'o', 'ms': 3, 'lw': 1},
    'identity': {'color': 'tab:green', 'marker': '^', 'ms': 4, 'lw': 1},
}


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
    path: str | os.PathLike | None = None,
    title: str = '',
    initial: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Any:
    """Draws mean and range over the channels of each branch's scale against depth.

    Args:
        scales: `Scales`, or module name to branch name to vector, in the order of the network.
        path: Picture to write, in the format that its suffix names. Defaults to none.
        title: Text above the picture.
        initial: The values that the search started from, to draw beside them.

    Returns:
        The figure, a `matplotlib.figure.Figure`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure, axes = subplots(1, 1, (9, 4))
    for branch in sorted({branch for vectors in scales.values() for branch in vectors}, reverse=True):
        found = {depth: vectors[branch] for depth, vectors in enumerate(scales.values()) if branch in vectors}
        means, lowest, highest = (
            [measure(vector).item() for vector in found.values()] for measure in (Tensor.mean, Tensor.min, Tensor.max)
        )
        style = _STYLES.get(branch, {'marker': 'o', 'ms': 3})
        color = axes.plot([*found], means, label=branch, **style)[0].get_color()
        axes.vlines([*found], lowest, highest, color=color, alpha=0.4)
        starts = enumerate((initial or {}).get(module, {}) for module in scales)
        began = {depth: vectors[branch].mean().item() for depth, vectors in starts if branch in vectors}
        # Of scales that were not searched they would be the same points again.
        if began and [*began.values()] != means:
            axes.plot([*began], [*began.values()], '_', color=color, ms=9, mew=1.5, label=f'{branch}, initial')
    stages = [depth for depth, module in enumerate(scales) if module.endswith('.0.conv')]
    for stage, depth in enumerate(stages, start=1):
        axes.axvline(depth - 0.5, color='0.85', lw=1, zorder=0)
        axes.text(depth - 0.4, 1.01, f'stage {stage}', transform=axes.get_xaxis_transform(), fontsize=8, color='0.4')
    axes.axhline(0, color='0.7', lw=0.8, zorder=0)
    axes.set(xlabel='convolution, from the stem on', ylabel='scale: mean, and range over channels')
    axes.set_title(title, loc='left', pad=16)
    axes.legend(frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))
    if path is not None:
        save_figure(figure, path)
    return figure


def plot_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], path: str | os.PathLike | None = None) -> Any:
    """Draws training loss and top-1 accuracy of runs against epochs.

    Args:
        histories: Name of a run to its rows, each with `epoch`, `train_loss` and, if evaluated, `eval_top1` in percent.
        path: Picture to write, in the format that its suffix names. Defaults to none.

    Returns:
        The figure, a `matplotlib.figure.Figure`.

    Raises:
        ImportError: If matplotlib is not installed.
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
    if path is not None:
        save_figure(figure, path)
    return figure
