"""Lists each comparison with RepOptSGD in the reports of this folder, and which survive Holm's correction.

python docs/evidence/comparisons.py

Each is a paired t-test over seeds, two-sided, of a report.json; a run in two reports counts once. Holm (1979)
holds the chance of one false find among all of them at 5 %.
"""

import json
from pathlib import Path

from scipy.stats import ttest_rel

from repopt_timm.reporting import markdown_table

REFERENCE = 'repopt'
LEVEL = 0.05


def comparisons() -> list[tuple[float, str, str, float, int]]:
    """Returns p, trial, arm, mean difference of the arm to RepOptSGD in points, and number of seeds."""
    found = {}
    for path in sorted(Path(__file__).parent.glob('*/report.json')):
        content = json.loads(path.read_text(encoding='utf-8'))
        # A report of several trials holds one entry for each.
        for trial, report in {path.parent.name: content}.items() if 'arms' in content else content.items():
            reference = report['arms'].get(REFERENCE, {}).get('top1', {})
            for arm, each in report['arms'].items():
                seeds = sorted(set(reference) & set(each['top1']))
                if arm == REFERENCE or len(seeds) < 2:
                    continue
                ours, others = ([row[seed] for seed in seeds] for row in (reference, each['top1']))
                difference = sum(others) / len(seeds) - sum(ours) / len(seeds)
                key = (trial, arm, *map(tuple, (ours, others)))
                found[key] = (float(ttest_rel(others, ours).pvalue), trial, arm, difference, len(seeds))
    return sorted(found.values())


def main() -> None:
    """Prints the table, smallest p first."""
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
