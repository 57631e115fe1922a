"""What does INT8 cost the networks of a trial, over its seeds?

    python docs/evidence/int8.py TRIAL IMAGES OUTPUT [ARM ...]

Quantizes the last checkpoint of each finished run of the trial, or of these arms, as it is and equalized, calibrated on
512 training images of the folder IMAGES by minimum and maximum. Writes OUTPUT/int8.csv, a row for each run,
granularity and form, and OUTPUT/int8.md, the mean changes. Runs that are in int8.csv already are not quantized again.
"""

import csv
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from repopt_timm.deploy import QuantizationOptions, compare_int8
from repopt_timm.reporting import markdown_table
from repopt_timm.trial.arms import ARMS
from repopt_timm.trial.statistics import Interval

WAYS = {
    ('0', 'per-channel'): 'per channel',
    ('0', 'per-tensor'): 'per tensor',
    ('1', 'per-channel'): 'equalized, per channel',
    ('1', 'per-tensor'): 'equalized, per tensor',
}
"""Whether it is equalized and its granularity, as in the CSV, to the heading."""

COLUMNS = ['arm', 'seed', 'weights', 'equalized', 'float32', 'int8', 'drop', 'dead channels removed']


def losses(run: Path, images: str) -> Iterator[list[object]]:
    """Quantizes a run's last checkpoint in four ways."""
    ways = [
        QuantizationOptions(equalize=equalize, weights=weights)
        for equalize in (False, True)
        for weights in ('per-channel', 'per-tensor')
    ]
    found = compare_int8({'network': run / 'last.pth.tar'}, images, ways, latency_batches=(), threads=1)
    rows = found['accuracy']
    float32 = next(row['top1'] for row in rows if row['weights'] == 'float32')
    removed = sum(found['equalization']['network']['removed'].values())
    for row in rows:
        if row['weights'] != 'float32':
            numbers = [f'{each:.2f}' for each in (float32, row['top1'], row['drop'])]
            numbers.append(str(removed if row['equalized'] else 0))
            yield [run.parent.name, run.name.removeprefix('seed-'), row['weights'], int(row['equalized']), *numbers]


def table(rows: list[dict[str, str]]) -> str:
    """Returns the mean change of top-1 in points, with 95 % intervals over seeds, of each arm in each of the ways."""
    changes: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    float32: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        changes[row['arm']][row['equalized'], row['weights']].append(-float(row['drop']))
        float32[row['arm']][row['seed']] = float(row['float32'])
    cells = [
        [
            arm,
            str(len(float32[arm])),
            f'{Interval.of([*float32[arm].values()]).mean:.2f}',
            *(Interval.of(changes[arm][way]).text() for way in WAYS),
        ]
        for arm in ARMS
        if arm in changes
    ]
    return markdown_table(['arm', 'seeds', 'float32', *WAYS.values()], cells, align=True)


def main() -> None:
    trial, images, output = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    output.mkdir(parents=True, exist_ok=True)
    path = output / 'int8.csv'
    if not path.exists():
        path.write_text(','.join(COLUMNS) + '\n', encoding='utf-8')
    with open(path, encoding='utf-8', newline='') as file:
        known = {(row['arm'], row['seed']) for row in csv.DictReader(file)}
    for report in sorted(trial.glob('runs/*/seed-*/report.md')):
        run = report.parent
        arm, seed = run.parent.name, run.name.removeprefix('seed-')
        if (arm, seed) not in known and arm in (sys.argv[4:] or [arm]):
            new = list(losses(run, images))
            with open(path, 'a', encoding='utf-8', newline='') as file:
                csv.writer(file, lineterminator='\n').writerows(new)
    with open(path, encoding='utf-8', newline='') as file:
        text = table(list(csv.DictReader(file)))
    (output / 'int8.md').write_text(text + '\n', encoding='utf-8')
    print(text)


if __name__ == '__main__':
    main()
