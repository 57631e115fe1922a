"""Draws `gain.png`: accuracy against training time of two networks, from the curves of docs/evidence.

python docs/figures/gain.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

EVIDENCE = Path(__file__).parents[1] / 'evidence'
PANELS = {
    'MobileOne-S0, after 4 and 8 epochs': ('mobileone_s0', 'mobileone_s0'),
    'RepOpt-VGG, 48 convolutions, after 2 and 4 epochs': ('depth', '48'),
}
ARMS = {
    'branches': ('with branches, SGD', 'C0', 's--'),
    'sgd': ('plain, SGD', 'C7', 'o:'),
    'dirac': ('plain, nn.init.dirac_, SGD', 'C4', 'v:'),
    'init': ('plain, Rule of Initialization, SGD', 'C1', '^:'),
    'repopt': ('RepOptSGD', 'C3', 'o-'),
    'identity': ('RepOptSGD, identity start', 'C2', 'D-'),
}


def main() -> None:
    """Writes the picture beside this file."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(10.5, 3.9), layout='constrained')
    for axes, (title, (page, trial)) in zip(panels, PANELS.items()):
        rows = pd.read_csv(EVIDENCE / page / 'epochs.csv')
        rows = rows[rows.trial == trial]
        top1 = rows.groupby(['arm', 'epoch']).eval_top1.mean().dropna()
        seconds = rows.groupby('arm').train_seconds.median()
        for arm, (label, color, style) in ARMS.items():
            if arm in seconds:
                # All plain arms train one network, so they share the time of `sgd`: not all ran beside each other.
                minutes = top1[arm].index * seconds['branches' if arm == 'branches' else 'sgd'] / 60
                axes.plot(minutes, top1[arm], style, color=color, label=label, ms=6)
        axes.set_title(title, fontsize=11)
        axes.set_xlim(left=0)
        axes.set_xlabel('training time on one core (min)')
        axes.grid(alpha=0.25)
    panels[0].set_ylabel('top-1 accuracy (%), CIFAR-10')
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside right center', frameon=False, fontsize=9)
    figure.savefig(Path(__file__).with_suffix('.png'), dpi=110)


if __name__ == '__main__':
    main()
