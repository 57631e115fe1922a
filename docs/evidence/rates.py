"""How much does the learning rate matter? Accuracy of the tuning runs of a trial, against their learning rate.

    python docs/evidence/rates.py TRIAL OUTPUT

Reads TRIAL/tuning. Writes OUTPUT/rates.csv, held-out accuracy in percent of each arm at each learning rate, and
OUTPUT/rates.png. Each point is one run. A run that diverged has no accuracy.
"""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt

ARMS = {
    'sgd': ('plain, SGD', 'C7', 'o:'),
    'dirac': ('plain, nn.init.dirac_, SGD', 'C4', 'v:'),
    'init': ('plain, Rule of Initialization, SGD', 'C1', '^:'),
    'repopt': ('RepOptSGD', 'C3', 'o-'),
    'identity': ('RepOptSGD, identity start', 'C2', 'D-'),
}


def accuracies(tuning: Path) -> dict[float, float]:
    """Returns learning rate to top-1 in percent after the last epoch, of the runs of an arm."""
    found = {}
    for path in tuning.glob('lr-*/summary.csv'):
        with open(path, encoding='utf-8', newline='') as file:
            *_, last = csv.DictReader(file)
        if last.get('eval_top1'):
            found[float(path.parent.name.removeprefix('lr-'))] = float(last['eval_top1'])
    return dict(sorted(found.items()))


def main() -> None:
    """Writes the table and the picture."""
    trial, output = Path(sys.argv[1]), Path(sys.argv[2])
    output.mkdir(parents=True, exist_ok=True)
    found = {arm: accuracies(trial / 'tuning' / arm) for arm in ARMS}
    rates = sorted({rate for runs in found.values() for rate in runs})
    with open(output / 'rates.csv', 'w', encoding='utf-8', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(['learning rate', *ARMS])
        for rate in rates:
            writer.writerow([rate, *(f'{runs[rate]:.2f}' if rate in runs else '' for runs in found.values())])
    figure, axes = plt.subplots(figsize=(6.4, 3.9), layout='constrained')
    for arm, (label, color, style) in ARMS.items():
        axes.plot(list(found[arm]), list(found[arm].values()), style, color=color, label=label)
    axes.set_xscale('log', base=2)
    axes.set_xticks(rates, [f'{rate:g}' for rate in rates])
    axes.set_xlabel('learning rate')
    axes.set_ylabel('top-1 (%), 5,000 held-out images')
    axes.grid(alpha=0.25)
    figure.legend(loc='outside upper center', ncols=2, frameon=False, fontsize=9)
    figure.savefig(output / 'rates.png', dpi=140)


if __name__ == '__main__':
    main()
