"""The reports of this folder in two tables, and each comparison with RepOptSGD, with Holm's correction.

python docs/evidence/overview.py

The first table is the gain of the way to train that the page recommends, with the 95 % interval of paired seeds. The
second is the mean of each arm. Each comparison is a paired t-test over seeds, two-sided. Holm (1979) holds the chance
of one false find among all of them at 5 %.
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from scipy.stats import ttest_rel

from repopt_timm.reporting import markdown_table
from repopt_timm.trial.statistics import Interval

ARMS = ('branches', 'unit_branches', 'sgd', 'adamw', 'dirac', 'init', 'repopt', 'identity')
BRANCHES = ('branches', 'unit_branches')
REFERENCE = 'repopt'
LEVEL = 0.05
RECOMMENDED = {
    '22': ('22 convolutions', 'repopt'),
    '22-long': ('22 convolutions', 'repopt'),
    '32': ('32 convolutions', 'repopt'),
    '48': ('48 convolutions', 'identity'),
    '48-long': ('48 convolutions', 'identity'),
    '94': ('94 convolutions', 'repopt'),
    'a0': ('RepOpt-VGG-A0', 'repopt'),
    'mobileone_s0': ('MobileOne-S0', 'repopt'),
    'mobileone_s0-long': ('MobileOne-S0', 'repopt'),
    'resnet18': ('narrow ResNet-18', 'sgd'),
}
"""Trial to its network and the arm that the page recommends for it."""
NAMES = {'repopt': 'RepOptSGD', 'identity': 'RepOptSGD, identity start', 'sgd': 'plain SGD'}


def reports() -> dict[str, dict[str, Any]]:
    """Returns name of a trial to its entry in a report.json."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(Path(__file__).parent.glob('*/report.json')):
        content = json.loads(path.read_text(encoding='utf-8'))
        # A report of several trials holds one entry for each.
        found |= {path.parent.name: content} if 'arms' in content else content
    return found


def gain(top1: dict[str, dict[str, float]], arm: str, others: tuple[str, ...]) -> str:
    """Returns points of an arm above the best of others, with an interval if there are more than two seeds."""
    others = tuple(each for each in others if each in top1 and each != arm)
    if not others:
        return '-'
    rival = top1[max(others, key=lambda each: mean(top1[each].values()))]
    found = Interval.of(top1[arm][seed] - rival[seed] for seed in set(top1[arm]) & set(rival))
    return f'{found.mean:+.1f}' + (f' ({found.lower:.1f} to {found.upper:.1f})' if found.count > 2 else '')


def comparisons() -> list[tuple[float, str, str, float, int]]:
    """Returns p, trial, arm, mean difference of the arm to RepOptSGD in points, and number of seeds."""
    found = []
    for trial, report in reports().items():
        reference = report['arms'].get(REFERENCE, {}).get('top1', {})
        for arm, each in report['arms'].items():
            seeds = sorted(set(reference) & set(each['top1']))
            if arm != REFERENCE and len(seeds) > 1:
                ours, others = ([row[seed] for seed in seeds] for row in (reference, each['top1']))
                difference = (sum(others) - sum(ours)) / len(seeds)
                found.append((float(ttest_rel(others, ours).pvalue), trial, arm, difference, len(seeds)))
    return sorted(found)


def main() -> None:
    """Prints the tables: gains in points, means in percent, then comparisons with the smallest p first."""
    gains: list[tuple[str, ...]] = []
    rows: list[tuple[str, ...]] = []
    found = reports()
    for trial, (network, use) in RECOMMENDED.items():
        arms = found[trial]['arms']
        top1 = {arm: each['top1'] for arm, each in arms.items() if each['top1']}
        run = (network, str(found[trial]['epochs']), str(len(top1[REFERENCE])))
        gains.append((*run, NAMES[use], gain(top1, use, ('sgd',)), gain(top1, use, BRANCHES)))
        rows.append((*run, *(f'{mean(top1[arm].values()):.1f}' if arm in top1 else '-' for arm in ARMS)))
    head = ('network', 'epochs', 'seeds')
    print(markdown_table((*head, 'use', 'above plain SGD', 'above branches'), gains, align=True), end='\n\n')
    print(markdown_table((*head, *ARMS), rows, align=True), end='\n\n')
    rows, found = [], comparisons()
    survives = True
    for rank, (p, trial, arm, difference, seeds) in enumerate(found):
        survives = survives and p <= LEVEL / (len(found) - rank)
        rows.append((trial, arm, f'{difference:+.2f}', str(seeds), f'{p:.4f}', 'yes' if survives else 'no'))
    head = ('trial', 'arm', f'points above {REFERENCE}', 'seeds', 'p', 'survives Holm')
    print(f'{len(found)} comparisons; {sum(row[-1] == "yes" for row in rows)} survive.\n')
    print(markdown_table(head, rows, align=True))


if __name__ == '__main__':
    main()
