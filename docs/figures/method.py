"""Draws `method.png`: the branches of a CSLA convolution, and the one convolution with a Grad Mult that trains alike.

python docs/figures/method.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import nn

from repopt_timm import make_grad_mults, prepare

COLORS = {'kxk': '#cfe2f3', '1x1': '#d9ead3', 'identity': '#fff2cc', 'plain': '#d9d2e9', 'none': '#f5f5f5'}
SCALES = {'kxk': 0.6, '1x1': 0.8}


def box(axes: Axes, x: float, y: float, text: str, color: str, width: float = 1.5) -> None:
    patch = FancyBboxPatch((x - width / 2, y - 0.2), width, 0.4, boxstyle='round,pad=0.04', fc=color, ec='#444444')
    axes.add_patch(patch)
    axes.text(x, y, text, ha='center', va='center', fontsize=10.5)


def arrow(axes: Axes, start: tuple[float, float], stop: tuple[float, float]) -> None:
    axes.add_patch(
        FancyArrowPatch(start, stop, arrowstyle='-|>', mutation_scale=11, color='#444444', shrinkA=0, shrinkB=0)
    )


def branches(axes: Axes) -> None:
    """Draws a block with three scaled branches."""
    axes.set_title('CSLA: three branches, constant scales', fontsize=12)
    box(axes, 0, 3.2, 'x', COLORS['none'], 0.6)
    columns = [
        (-1.9, 'kxk', f'{SCALES["kxk"]} $\\cdot$ 3x3 conv'),
        (0, '1x1', f'{SCALES["1x1"]} $\\cdot$ 1x1 conv'),
        (1.9, 'identity', 'identity, trained\nper channel'),
    ]
    for x, name, text in columns:
        arrow(axes, (0, 2.98), (x, 2.44))
        box(axes, x, 2.2, text, COLORS[name])
        arrow(axes, (x, 1.98), (0.12 * x, 1.12 if x == 0 else 1.02))
    box(axes, 0, 0.9, '+', COLORS['none'], 0.3)
    arrow(axes, (0, 0.68), (0, 0.3))
    axes.text(0, 0.1, 'BatchNorm, ReLU', ha='center', va='center', fontsize=10.5)
    axes.text(0, -0.45, 'trained by plain SGD', ha='center', fontsize=10.5, style='italic')


def plain(axes: Axes) -> None:
    """Draws the block that a RepOptimizer trains."""
    axes.set_title('RepOpt: one convolution', fontsize=12)
    box(axes, 0, 3.2, 'x', COLORS['none'], 0.6)
    arrow(axes, (0, 2.98), (0, 2.0))
    box(axes, 0, 1.76, '3x3 conv', COLORS['plain'])
    arrow(axes, (0, 1.54), (0, 0.3))
    axes.text(0, 0.1, 'BatchNorm, ReLU', ha='center', va='center', fontsize=10.5)
    axes.text(0, -0.45, 'trained by SGD on gradient $\\times$ Grad Mult', ha='center', fontsize=10.5, style='italic')


def grad_mult(axes: Axes, values: torch.Tensor, title: str) -> None:
    """Draws the Grad Mult of one input channel's taps."""
    axes.imshow(values, cmap='Purples', vmin=0, vmax=2.4)
    for row, taps in enumerate(values.tolist()):
        for column, value in enumerate(taps):
            color = 'white' if value > 1.6 else 'black'
            axes.text(column, row, f'{value:.2f}', ha='center', va='center', fontsize=11, color=color)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=10)


def main() -> None:
    """Writes the picture beside this file."""
    conv = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, bias=False))
    prepare(
        conv, {'0': {name: torch.full((2,), value) for name, value in SCALES.items()} | {'identity': torch.ones(2)}}
    )
    ((_, mult),) = make_grad_mults(conv).items()

    figure = plt.figure(figsize=(12.5, 4.2), layout='constrained')
    grid = figure.add_gridspec(2, 3, width_ratios=[5, 3.6, 2.4])
    for draw, axes, width in (
        (branches, figure.add_subplot(grid[:, 0]), 3),
        (plain, figure.add_subplot(grid[:, 1]), 2.2),
    ):
        draw(axes)
        axes.set_xlim(-width, width)
        axes.set_ylim(-0.7, 3.6)
        axes.axis('off')
    grad_mult(
        figure.add_subplot(grid[0, 2]),
        mult[0, 0],
        'Grad Mult, channel to itself:\n$s_{3\\times 3}^2$; centre $s_{3\\times 3}^2 + s_{1\\times 1}^2 + 1$',
    )
    grad_mult(
        figure.add_subplot(grid[1, 2]),
        mult[0, 1],
        'Grad Mult, to another channel:\n$s_{3\\times 3}^2$; centre $s_{3\\times 3}^2 + s_{1\\times 1}^2$',
    )
    figure.savefig(Path(__file__).with_suffix('.png'), dpi=110)


if __name__ == '__main__':
    main()
