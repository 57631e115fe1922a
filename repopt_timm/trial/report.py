"""Reports of one trial or of several: tables, what they show in plain words, JSON, CSV and a picture."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import write_text
from ..reporting import markdown_table
from .arms import arm_of, in_order
from .pictures import draw_trial, draw_trials
from .results import ArmResult, TrialResult
from .statistics import Interval, is_guessing, seeds_to_show
from .trial_folder import protocol

# A difference that a trial should be able to show, in points.
_POINTS = 2.0


def report_trial(result: TrialResult) -> str:
    """Writes `report.md`, `report.json`, `epochs.csv` and `report.png` into a trial's folder; returns the first."""
    trial, shared = result.trial, result.trial.shared
    seeds = ', '.join(map(str, trial.seeds))
    what = [f'{shared["epochs"]} epochs', f'batch {shared["batch_size"]}', f'seeds {seeds}']
    if shared['train_images']:
        what.append(f'{shared["train_images"]} training images')
    if shared['model_kwargs']:
        what.append(', '.join(f'{name}={value}' for name, value in shared['model_kwargs'].items()))
    if trial.lr is not None:
        how = f'All arms at learning rate {trial.lr:g}.'
    else:
        how = (
            f'Learning rates: the best in runs of {trial.tuning_epochs} epochs on a held-out {trial.holdout:.0%} '
            f'of the training images, from {", ".join(f"{lr:g}" for lr in trial.lrs)} and beyond.'
        )
    how += ''.join(f' {arm}: {arm_of(arm).rate:g} times these.' for arm in trial.arms if arm_of(arm).rate != 1)
    head = ['arm', 'lr', 'seeds', 'top-1, 95 %', f'difference to {result.reference}, 95 %']
    head += ['s per epoch', 'step', 'activations', 'parameters']
    rows = []
    for arm in result.arms.values():
        row = [f'{arm.name}: {arm_of(arm.name).title}', *_scores(result, arm), _number(arm.epoch_seconds, '.1f'), '-']
        costs, base = arm.costs, result.arms[result.reference].costs
        if costs and base:
            row[-1] = f'{costs["step_seconds"] / base["step_seconds"]:.2f} x'
        units = {'activations': 'MB', 'parameters': 'M'}
        rows.append(row + [f'{costs[name] / 1e6:.2f} {unit}' if costs else '-' for name, unit in units.items()])
    parts = [
        f'# {trial.model} on {Path(shared["data_dir"] or shared["dataset"]).absolute().name}',
        f'{"; ".join(what)}. {how} Top-1 accuracy in percent on the validation images after the last epoch.',
        markdown_table(head, rows, align=True),
        _bullets(_verdict(result)),
    ]
    epochs = {result.trial.folder.name: result.epochs}
    return _write(result.trial.folder, parts, _values(result), epochs, partial(draw_trial, result))


def report_trials(results: Sequence[TrialResult], folder: Path) -> str:
    """Writes one report of several trials, with budgets compared at equal wall time if the trials share all else."""
    # Trials in several folders may have the same name.
    common = os.path.commonpath([result.trial.folder.absolute().parent for result in results])
    in_turn = sorted(results, key=lambda result: (result.convolutions, result.trial.shared['epochs']))
    named = {os.path.relpath(result.trial.folder, common): result for result in in_turn}
    arms = in_order(arm for result in in_turn for arm in result.arms)
    searched = any(arm.search_seconds for result in in_turn for arm in result.arms.values())
    beside, rows, sections = [], [], []
    for name, result in named.items():
        each = result.arms
        cells = [name, str(result.convolutions or '-'), str(result.trial.shared['epochs'])]
        beside.append([*cells, *(_accuracy(each[arm]) if arm in each else '-' for arm in arms)])
        for arm in each.values():
            rows.append([*cells, arm.name, *_scores(result, arm), _number(arm.seconds, '.0f', ' s')])
        sections += [f'## {name}', _bullets(_verdict(result))]
    if equal := list(_equal_times(in_turn)):
        sections += ['## Equal wall time', _bullets(equal)]
    head = ['trial', 'convolutions', 'epochs', 'arm', 'lr', 'seeds', 'top-1, 95 %', 'difference, 95 %', 'wall time']
    parts = [
        f'# {len(results)} trials',
        'Top-1 accuracy in percent on the validation images after the last epoch. Differences are from '
        f'{" or ".join(sorted({result.reference for result in results}))}, over paired seeds. Wall time is the '
        f'training time of one run{" and of its search" if searched else ""}.',
        markdown_table([*head[:3], *arms], beside, align=True),
        markdown_table(head, rows, align=True),
        *sections,
    ]
    values = {name: _values(result) for name, result in named.items()}
    epochs = {name: result.epochs for name, result in named.items()}
    return _write(folder, parts, values, epochs, partial(draw_trials, results))


def _write(
    folder: Path,
    parts: Sequence[str],
    values: dict[str, Any],
    epochs: Mapping[str, pd.DataFrame],
    draw: Callable[[Path], Any],
) -> str:
    text = '\n\n'.join(parts) + '\n'
    write_text(folder / 'report.md', text)
    # JSON has neither NaN nor infinity.
    finite = json.loads(json.dumps(values), parse_constant=lambda name: None)
    write_text(folder / 'report.json', json.dumps(finite, indent=2) + '\n')
    tables = [table.assign(trial=name) for name, table in epochs.items()]
    rows = pd.concat([table for table in tables if len(table)] or tables[:1])
    write_text(folder / 'epochs.csv', rows[['trial', *rows.columns.drop('trial')]].to_csv(index=False))
    draw(folder / 'report.png')
    return text


def _bullets(sentences: Sequence[str]) -> str:
    return '\n'.join(f'* {sentence}' for sentence in sentences)


def _values(result: TrialResult) -> dict[str, Any]:
    """Returns what `report.json` holds of a trial."""
    arms = {
        name: {
            'lr': arm.choice.best,
            'lr_at_edge': arm.choice.at_edge,
            'tuning': arm.tuning,
            'top1': arm.top1.dropna().to_dict(),
            'mean': asdict(arm.mean),
            'difference': {**asdict(arm.difference), 'lower': arm.difference.lower, 'upper': arm.difference.upper},
            'diverged': arm.failures,
            'epoch_seconds': arm.epoch_seconds,
            'search_seconds': arm.search_seconds,
            **arm.costs,
        }
        for name, arm in result.arms.items()
    }
    return {
        'settings': {**result.trial.settings, 'reference': result.reference},
        'epochs': result.trial.shared['epochs'],
        'convolutions': result.convolutions,
        'arms': arms,
        'search': None if result.search is None else vars(result.search),
        'verdict': _verdict(result),
    }


def _accuracy(arm: ArmResult) -> str:
    """Formats the mean accuracy of the finished runs, and how many runs diverged."""
    diverged = len(arm.failures)
    if arm.is_hopeless or diverged == len(arm.top1):
        return 'all diverged'
    return arm.mean.text(sign='') + (f', diverged: {diverged}' if diverged else '')


def _number(value: float | None, form: str, unit: str = '') -> str:
    return '-' if value is None or math.isnan(value) else f'{value:{form}}{unit}'


def _scores(result: TrialResult, arm: ArmResult) -> list[str]:
    """Returns what all tables show of an arm: learning rate, seeds, accuracy and difference."""
    difference = '' if arm.name == result.reference else arm.difference.text()
    return [_number(arm.choice.best, 'g'), str(arm.mean.count), _accuracy(arm), difference]


def _among(*arms: ArmResult) -> str:
    return ', among the seeds that did not diverge' if any(arm.failures for arm in arms) else ''


def _verdict(result: TrialResult) -> list[str]:
    """Returns sentences: each arm against the reference, what failed, what a search did."""
    reference = result.arms[result.reference]
    sentences = [_against(reference, arm) for arm in result.arms.values() if arm is not reference]
    sentences += [sentence for arm in result.arms.values() for sentence in _troubles(result, arm)]
    return sentences if result.search is None else [*sentences, result.search.sentence()]


def _against(reference: ArmResult, arm: ArmResult) -> str:
    found, among = arm.difference, _among(arm, reference)
    pair = f'{arm.name} and {reference.name}'
    if not found.count:
        return f'{pair}: no seed has finished runs of both.'
    if found.count == 1:
        return f'{pair}{among}: one seed, {found.mean:+.2f} points. One seed cannot say how much of that is chance.'
    numbers = f'({found.mean:+.2f} points, 95 % interval {found.lower:+.2f} to {found.upper:+.2f}'
    if found.excludes_zero:
        better = f'{"better" if found.mean > 0 else "worse"} than {reference.name} by {abs(found.mean):.2f} points'
        return f'{arm.name} is {better}{among} {numbers}, {found.count} seeds).'
    text = f'{pair}{among}: no difference that {found.count} seeds can show {numbers}).'
    if found.half > _POINTS:
        few, many = seeds_to_show(_POINTS, found)
        text += f' About {few} seeds would show {_POINTS:g} points, or {many} if the spread is underestimated.'
    return text


def _troubles(result: TrialResult, arm: ArmResult) -> list[str]:
    trial, name, best = result.trial, arm.name, arm.choice.best
    found = [
        f'The search in searches/{folder} diverged, and what needs its scales does not train: {failure} Repeat the '
        f'trial in another --output with gradients clipped, --clip-grad 5, or search beforehand at a lower learning '
        f'rate and give the result, --scales NAME=FILE.'
        for folder, failure in arm.search_failures.items()
    ]
    if arm.is_hopeless:
        return found or [f'{name} diverged at every learning rate that was tried.']
    top1 = math.nan if best is None else arm.tuning.get(best, math.nan)
    if trial.classes and trial.held_out and is_guessing(top1, trial.classes, trial.held_out):
        found.append(
            f'{name} may not have learned anything: at its best learning rate, {best:g}, it reached {top1:.2f} %, '
            f'which guessing among {trial.classes} classes can reach on {trial.held_out} held-out images.'
        )
    elif arm.choice.at_edge:
        found.append(
            f'The learning rate of {name}, {best:g}, is at the edge of what was tried: a better one may lie beyond.'
        )
    count, diverged, finished = len(arm.top1), len(arm.failures), arm.mean.count
    if diverged:
        others = '; its mean is that of the others' if finished else ''
        found.append(f'{diverged} of {count} runs of {name} diverged{others}.')
    if missing := count - finished - diverged:
        found.append(f'{missing} of {count} runs of {name} are not finished.')
    return found


def _equal_times(results: Sequence[TrialResult]) -> Iterator[str]:
    """Compares the slowest arm of each trial with the longest runs of other arms that take at most 5 % more time."""
    for result in results:
        if not result.timed:
            continue
        slowest = max(result.timed, key=lambda arm: arm.seconds)
        # Times vary by some percent from run to run. The last one is the longest, as results are in that order.
        longest = {
            arm.name: arm
            for other in results
            if other.trial.shared['epochs'] > result.trial.shared['epochs'] and _task(other) == _task(result)
            for arm in other.timed
            if arm.name != slowest.name and arm.seconds <= 1.05 * slowest.seconds
        }
        for rival in longest.values():
            difference = Interval.of(rival.top1 - slowest.top1)
            known = difference.count < 2 or difference.excludes_zero
            runs = [f'{arm.name} in {arm.length} epochs ({arm.seconds:.0f} s)' for arm in (rival, slowest)]
            yield (
                f'{" and ".join(runs)}{_among(rival, slowest)}: '
                f'{"" if known else "no difference that the seeds can show, "}{difference.text()} points, '
                f'{difference.count} seeds.'
            )


def _task(result: TrialResult) -> dict[str, Any]:
    """Returns all that runs of several lengths have to have in common."""
    length = ('epochs', 'warmup_epochs', 'val_interval')
    values = {name: value for name, value in protocol(result.trial.shared).items() if name not in length}
    return {**values, 'model': result.trial.model}
