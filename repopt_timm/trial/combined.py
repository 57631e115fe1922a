"""One report of several trials: accuracy against depth, and against wall time."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..plot import save_figure, subplots
from ..reporting import markdown_table
from .arms import in_order
from .intervals import Interval
from .results import SAME_TIME, ArmResult, TrialResult, paired
from .trial_folder import protocol
from .trial_pictures import colors_of
from .verdict import accuracy_text, among_text, interval_text, verdict

__all__ = ['combined_report', 'draw_trials']

# What changes with the length of a run.
_BUDGET = ('epochs', 'warmup_epochs', 'val_interval')

# A marker and a line for each number of epochs.
_STYLES = ('o-', 's--', '^:', 'D-.')


class _Row(NamedTuple):
    trial: TrialResult
    arm: ArmResult

    @property
    def epochs(self) -> int:
        return self.trial.shared.epochs + self.trial.shared.cooldown_epochs

    @property
    def seconds(self) -> float:
        return self.arm.seconds(self.epochs)

    @property
    def mean(self) -> Interval:
        return Interval.of(list(self.arm.top1.values()))


def combined_report(trials: Sequence[TrialResult]) -> str:
    """Returns tables and verdicts of several trials as Markdown; those at equal wall time if their epochs differ."""
    trials = sorted(trials, key=lambda trial: (trial.convolutions, trial.shared.epochs))
    head = ['trial', 'convolutions', 'epochs', 'arm', 'lr', 'seeds', 'top-1, 95 %', 'difference, 95 %', 'wall time']
    searched = any(arm.search_seconds for trial in trials for arm in trial.arms.values())
    parts = [
        f'# {len(trials)} trials',
        'Top-1 accuracy in percent on the validation images after the last epoch. Differences are from '
        f'{" or ".join(sorted({trial.settings.reference for trial in trials}))}, over paired seeds. Wall time is the '
        f'training time of one run{" and of its search" if searched else ""}.',
        _arms_beside_each_other(trials),
        markdown_table(head, [_cells(row) for row in _rows(trials)], align=True),
    ]
    for trial in trials:
        parts += [f'## {trial.folder.name}', '\n'.join(f'* {sentence}' for sentence in verdict(trial))]
    if equal := list(_equal_times(trials)):
        parts += ['## Equal wall time', '\n'.join(f'* {sentence}' for sentence in equal)]
    return '\n\n'.join(parts) + '\n'


def _arms_beside_each_other(trials: Sequence[TrialResult]) -> str:
    arms = in_order(name for trial in trials for name in trial.arms)
    rows = []
    for trial in trials:
        cells = [accuracy_text(trial, trial.arms[name]) if name in trial.arms else '-' for name in arms]
        rows.append([trial.folder.name, str(trial.convolutions or '-'), str(_rows([trial])[0].epochs), *cells])
    return markdown_table(['trial', 'convolutions', 'epochs', *arms], rows, align=True)


def _rows(trials: Sequence[TrialResult]) -> list[_Row]:
    return [_Row(trial, arm) for trial in trials for arm in trial.arms.values()]


def _cells(row: _Row) -> list[str]:
    trial, arm = row
    return [
        trial.folder.name,
        str(trial.convolutions or '-'),
        str(row.epochs),
        arm.name,
        '-' if arm.choice.best is None else f'{arm.choice.best:g}',
        str(len(arm.top1)),
        accuracy_text(trial, arm),
        '' if arm is trial.reference else interval_text(trial.difference(arm.name)),
        '-' if math.isnan(row.seconds) else f'{row.seconds:.0f} s',
    ]


def _equal_times(trials: Sequence[TrialResult]) -> Iterator[str]:
    """Compares the slowest arm of each trial with the longest runs of other arms that take no more time."""
    rows = [row for row in _rows(trials) if row.arm.top1 and not math.isnan(row.seconds)]
    for trial in trials:
        own = [row for row in rows if row.trial is trial]
        if not own:
            continue
        slowest = max(own, key=lambda row: row.seconds)
        for name in trial.arms:
            rivals = [
                row
                for row in rows
                if row.arm.name == name != slowest.arm.name
                and _task(row.trial) == _task(trial)
                and row.epochs > slowest.epochs
                and row.seconds <= slowest.seconds * SAME_TIME
            ]
            if rivals:
                yield _comparison(max(rivals, key=lambda row: row.seconds), slowest)


def _task(trial: TrialResult) -> dict[str, Any]:
    """Returns all that runs of several lengths have to have in common."""
    values = {name: value for name, value in protocol(trial.shared).items() if name not in _BUDGET}
    return {**values, 'model': trial.settings.model}


def _comparison(rival: _Row, slowest: _Row) -> str:
    difference = paired(rival.arm.top1, slowest.arm.top1)
    what = (
        f'{rival.arm.name} in {rival.epochs} epochs ({rival.seconds:.0f} s) and {slowest.arm.name} in {slowest.epochs} '
        f'epochs ({slowest.seconds:.0f} s){among_text(rival.arm, slowest.arm)}'
    )
    numbers = f'{interval_text(difference)} points, {difference.count} seeds'
    if difference.count < 2:
        return f'{what}: {numbers}.'
    return f'{what}: {"" if difference.excludes_zero else "no difference that the seeds can show, "}{numbers}.'


def draw_trials(trials: Sequence[TrialResult], path: Path) -> Any:
    """Draws accuracy against the number of convolutions, and against the wall time of a run, with 95 % intervals.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure, (depths, times) = subplots(1, 2, (12, 4.5), layout='constrained')
    rows = [row for row in _rows(trials) if row.arm.top1]
    lines: dict[tuple[str, int], list[_Row]] = {}
    for row in rows:
        lines.setdefault((row.arm.name, row.epochs), []).append(row)
    budgets = sorted({epochs for _, epochs in lines})
    arms = in_order(name for name, _ in lines)
    colors = colors_of(arms)
    widest = max((row.trial.convolutions for row in rows), default=0)
    for (name, epochs), members in lines.items():
        style = _STYLES[budgets.index(epochs) % len(_STYLES)]
        members.sort(key=lambda row: row.trial.convolutions)
        # Beside each other, so that no error bar hides another.
        beside = 0.008 * widest * (arms.index(name) - (len(arms) - 1) / 2)
        _draw(depths, [row.trial.convolutions + beside for row in members], members, style, colors[name])
        _draw(times, [row.seconds for row in members], members, style[0], colors[name])
    depths.set(xlabel='convolutions', ylabel='top-1 accuracy on validation images (%)', title='mean, 95 % interval')
    depths.set_xticks(sorted({row.trial.convolutions for row in rows}))
    times.set(xlabel='seconds of training of a run', xscale='log', title='the same against wall time')
    for axis in ('major', 'minor'):
        getattr(times.xaxis, f'set_{axis}_formatter')(
            lambda value, _: f'{value:g}' if f'{value:g}'[0] in '1235' else ''
        )
    for name in arms:
        depths.plot([], [], color=colors[name], label=name)
    for budget, style in zip(budgets, _STYLES):
        depths.plot([], [], style, color='0.3', label=f'{budget} epochs')
    if rows:
        figure.legend(loc='outside right upper', frameon=False)
    save_figure(figure, path)
    return figure


def _draw(axes: Any, x: list[float], rows: list[_Row], style: str, color: str) -> None:
    means = [row.mean for row in rows]
    halves = [mean.half if mean.count > 1 else 0 for mean in means]
    axes.errorbar(x, [mean.mean for mean in means], yerr=halves, fmt=style, color=color, capsize=3)
