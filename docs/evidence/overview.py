"""The reports of this folder in one table, and each comparison with RepOptSGD, with Holm's correction.

python docs/evidence/overview.py

Each comparison is a paired t-test over seeds, two-sided. Holm (1979) holds the chance of one false find among all of
them at 5 %.
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from scipy.stats import ttest_rel

from repopt_timm.reporting import markdown_table

ARMS = ('branches', 'unit_branches', 'sgd', 'dirac', 'init', 'repopt', 'identity')
REFERENCE = 'repopt'
LEVEL = 0.05


def reports() -> dict[str, dict[str, Any]]:
    """Returns name of a trial to its entry in a report.json."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(Path(__file__).parent.glob('*/report.json')):
        content = json.loads(path.read_text(encoding='utf-8'))
        # A report of several trials holds one entry for each.
        found |= {path.parent.name: content} if 'arms' in content else content
    return found


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
    """Prints the tables: means in percent, then comparisons with the smallest p first."""
    head = ('trial', 'epochs', 'seeds', *ARMS)
    rows: list[tuple[str, ...]] = []
    for trial, report in reports().items():
        if 'sgd' in report['arms']:
            top1 = {arm: each['top1'] for arm, each in report['arms'].items() if each['top1']}
            means = (f'{mean(top1[arm].values()):.1f}' if arm in top1 else '-' for arm in ARMS)
            rows.append((trial, str(report['epochs']), str(len(top1[REFERENCE])), *means))
    print(markdown_table(head, rows, align=True), end='\n\n')
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
