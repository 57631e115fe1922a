"""Draws `gain.png`: accuracy against training time of two networks, from the curves of docs/evidence.

python docs/figures/gain.py
"""

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean, median

import matplotlib.pyplot as plt

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


def curves(page: str, trial: str) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Returns arm to {epoch: mean top-1 in percent over seeds}, and seconds per epoch of its network.

    All plain arms train one network, so they share the time of `sgd`: not all were trained beside each other.
    """
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    seconds: dict[str, list[float]] = defaultdict(list)
    with open(EVIDENCE / page / 'epochs.csv', encoding='utf-8', newline='') as file:
        for row in csv.DictReader(file):
            if row['trial'] == trial and row['arm'] in ARMS:
                seconds[row['arm']] += [float(row['train_seconds'])] if row['train_seconds'] else []
                if row['eval_top1']:
                    found[row['arm']][int(row['epoch'])].append(float(row['eval_top1']))
    times = {arm: median(seconds['branches' if arm == 'branches' else 'sgd']) for arm in found}
    return {arm: {epoch: mean(top1) for epoch, top1 in epochs.items()} for arm, epochs in found.items()}, times


def main() -> None:
    """Writes the picture beside this file."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(10.5, 3.9), layout='constrained')
    for axes, (title, source) in zip(panels, PANELS.items()):
        found, times = curves(*source)
        for arm, (label, color, style) in ARMS.items():
            if arm in found:
                minutes = [epoch * times[arm] / 60 for epoch in found[arm]]
                axes.plot(minutes, list(found[arm].values()), style, color=color, label=label, ms=6)
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
