"""How much does the learning rate matter? Accuracy of the tuning runs of a trial, against their learning rate.

    python docs/evidence/rates.py TRIAL OUTPUT

Reads TRIAL/tuning. Writes OUTPUT/rates.csv, held-out accuracy in percent of each arm at each learning rate, and
OUTPUT/rates.png. Each point is one run. A run that diverged has no accuracy.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

ARMS = {
    'sgd': ('plain, SGD', 'C7', 'o:'),
    'dirac': ('plain, nn.init.dirac_, SGD', 'C4', 'v:'),
    'init': ('plain, Rule of Initialization, SGD', 'C1', '^:'),
    'repopt': ('RepOptSGD', 'C3', 'o-'),
    'identity': ('RepOptSGD, identity start', 'C2', 'D-'),
}


def accuracies(tuning: Path) -> pd.Series:
    """Returns top-1 in percent after the last epoch of the runs of an arm, by learning rate."""
    found = {
        float(path.parent.name.removeprefix('lr-')): pd.read_csv(path).iloc[-1].get('eval_top1')
        for path in tuning.glob('lr-*/summary.csv')
    }
    return pd.Series(found, dtype=float).dropna()


def main() -> None:
    """Writes the table and the picture."""
    trial, output = Path(sys.argv[1]), Path(sys.argv[2])
    output.mkdir(parents=True, exist_ok=True)
    found = pd.DataFrame({arm: accuracies(trial / 'tuning' / arm) for arm in ARMS}).sort_index()
    table = found.map('{:.2f}'.format, na_action='ignore')
    table.to_csv(output / 'rates.csv', index_label='learning rate')
    figure, axes = plt.subplots(figsize=(6.4, 3.9), layout='constrained')
    for arm, (label, color, style) in ARMS.items():
        axes.plot(found[arm].dropna(), style, color=color, label=label)
    axes.set_xscale('log', base=2)
    axes.set_xticks(found.index, [f'{rate:g}' for rate in found.index])
    axes.set_xlabel('learning rate')
    axes.set_ylabel('top-1 (%), 5,000 held-out images')
    axes.grid(alpha=0.25)
    figure.legend(loc='outside upper center', ncols=2, frameon=False, fontsize=9)
    figure.savefig(output / 'rates.png', dpi=140)


if __name__ == '__main__':
    main()
