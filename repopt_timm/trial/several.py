"""One report of several trials: beside each other, and at equal wall time."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..reporting import markdown_table
from .arms import in_order
from .intervals import Interval
from .pictures import draw_trials
from .report import accuracy_text, among_text, interval_text, verdict, write_report
from .results import SAME_TIME, TrialResult
from .trial_folder import protocol

__all__ = ['report_trials']

# What changes with the length of a run.
_BUDGET = ('epochs', 'warmup_epochs', 'val_interval')


def report_trials(results: Sequence[TrialResult], folder: Path) -> str:
    """Writes one report of several trials: `report.md`, `report.json`, `epochs.csv` and `report.png`.

    It compares budgets at equal wall time if the trials share all else.

    Returns:
        The report as Markdown.
    """
    in_turn = sorted(results, key=lambda result: (result.convolutions, result.length))
    rows = [_Row(result, arm) for result in in_turn for arm in result.choices]
    searched = any(row.result.search_seconds(row.arm) for row in rows)
    head = ['trial', 'convolutions', 'epochs', 'arm', 'lr', 'seeds', 'top-1, 95 %', 'difference, 95 %', 'wall time']
    arms = in_order(row.arm for row in rows)
    beside = [
        [*_name(result), *(accuracy_text(result, arm) if arm in result.choices else '-' for arm in arms)]
        for result in in_turn
    ]
    parts = [
        f'# {len(results)} trials',
        'Top-1 accuracy in percent on the validation images after the last epoch. Differences are from '
        f'{" or ".join(sorted({result.reference for result in results}))}, over paired seeds. Wall time is the '
        f'training time of one run{" and of its search" if searched else ""}.',
        markdown_table([*head[:3], *arms], beside, align=True),
        markdown_table(head, [_cells(*row) for row in rows], align=True),
    ]
    for result in in_turn:
        parts += [f'## {result.trial.folder.name}', '\n'.join(f'* {sentence}' for sentence in verdict(result))]
    if equal := list(_equal_times(rows)):
        parts += ['## Equal wall time', '\n'.join(f'* {sentence}' for sentence in equal)]
    text = '\n\n'.join(parts) + '\n'
    write_report(folder, text, None, results, lambda path: draw_trials(results, path))
    return text


class _Row(NamedTuple):
    result: TrialResult
    arm: str


def _name(result: TrialResult) -> list[str]:
    return [result.trial.folder.name, str(result.convolutions or '-'), str(result.length)]


def _cells(result: TrialResult, arm: str) -> list[str]:
    best, seconds = result.choices[arm].best, result.seconds(arm)
    return [
        *_name(result),
        arm,
        '-' if best is None else f'{best:g}',
        str(result.mean(arm).count),
        accuracy_text(result, arm),
        '' if arm == result.reference else interval_text(result.difference(arm)),
        '-' if math.isnan(seconds) else f'{seconds:.0f} s',
    ]


def _equal_times(rows: Sequence[_Row]) -> Iterator[str]:
    """Compares the slowest arm of each trial with the longest runs of other arms that take no more time."""
    rows = [row for row in rows if row.result.mean(row.arm).count and not math.isnan(row.result.seconds(row.arm))]
    seconds = {row: row.result.seconds(row.arm) for row in rows}
    for result in dict.fromkeys(row.result for row in rows):
        slowest = max((row for row in rows if row.result is result), key=lambda row: seconds[row])
        for arm in result.choices:
            rivals = [
                row
                for row in rows
                if row.arm == arm != slowest.arm
                and _task(row.result) == _task(result)
                and row.result.length > result.length
                and seconds[row] <= seconds[slowest] * SAME_TIME
            ]
            if rivals:
                yield _comparison(max(rivals, key=lambda row: seconds[row]), slowest)


def _task(result: TrialResult) -> dict[str, Any]:
    """Returns all that runs of several lengths have to have in common."""
    values = {name: value for name, value in protocol(result.trial.shared).items() if name not in _BUDGET}
    return {**values, 'model': result.trial.settings.model}


def _comparison(rival: _Row, slowest: _Row) -> str:
    difference = Interval.of(rival.result.top1[rival.arm] - slowest.result.top1[slowest.arm])
    pair = rival, slowest
    runs = [f'{arm} in {result.length} epochs ({result.seconds(arm):.0f} s)' for result, arm in pair]
    what = ' and '.join(runs) + among_text(*(result.failures[arm] for result, arm in pair))
    chance = '' if difference.count < 2 or difference.excludes_zero else 'no difference that the seeds can show, '
    return f'{what}: {chance}{interval_text(difference)} points, {difference.count} seeds.'
