"""Reports of one trial or of several: tables, what they show in plain words, JSON, CSV and a picture."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import write_text
from ..reporting import markdown_table
from .arms import arm_of, in_order
from .intervals import Interval, seeds_to_show
from .pictures import draw_trial, draw_trials
from .results import SAME_TIME, TrialResult
from .trial_folder import protocol
from .tuning import is_guessing

__all__ = ['interval_text', 'report_trial', 'report_trials']

# Smaller differences in time are noise on a busy machine.
_FASTER = 1.15

# A difference that a trial should be able to show, in points.
_POINTS = 2.0

_logger = logging.getLogger(__name__)


def report_trial(result: TrialResult) -> str:
    """Writes `report.md`, `report.json`, `epochs.csv` and `report.png` into a trial's folder.

    Returns:
        The report as Markdown.
    """
    trial, settings, shared = result.trial, result.trial.settings, result.trial.shared
    what = [f'{shared["epochs"]} epochs', f'batch {shared["batch_size"]}']
    what.append(f'seeds {", ".join(map(str, settings.seeds))}')
    if shared['train_images']:
        what.append(f'{shared["train_images"]} training images')
    if shared['model_kwargs']:
        what.append(', '.join(f'{name}={value}' for name, value in shared['model_kwargs'].items()))
    if settings.lr is not None:
        how = f'All arms at learning rate {settings.lr:g}.'
    else:
        how = (
            f'Learning rates: the best in runs of {settings.tuning_epochs} epochs on a held-out {settings.holdout:.0%} '
            f'of the training images, from {", ".join(f"{lr:g}" for lr in settings.lrs)} and beyond.'
        )
    how += ''.join(f' {arm}: {arm_of(arm).rate:g} times these.' for arm in settings.arms if arm_of(arm).rate != 1)
    head = ['arm', 'lr', 'seeds', 'top-1, 95 %', f'difference to {result.reference}, 95 %']
    head += ['s per epoch', 'step', 'activations', 'parameters']
    parts = [
        f'# {settings.model} on {Path(shared["data_dir"] or shared["dataset"]).name}',
        f'{"; ".join(what)}. {how} Top-1 accuracy in percent on the validation images after the last epoch.',
        markdown_table(head, [_row(result, arm) for arm in result.choices], align=True),
        _bullets(_verdict(result)),
    ]
    if times := _time_table(result):
        parts += [
            'At equal wall time of training, from the curves; a run that is cut off has not finished lowering its '
            'learning rate, so that a run planned for that time would do better:',
            times,
        ]
    return _write(trial.folder, parts, _values(result), [result], partial(draw_trial, result))


def report_trials(results: Sequence[TrialResult], folder: Path) -> str:
    """Writes one report of several trials: `report.md`, `report.json`, `epochs.csv` and `report.png`.

    It compares budgets at equal wall time if the trials share all else.

    Returns:
        The report as Markdown.
    """
    in_turn = sorted(results, key=lambda result: (result.convolutions, result.length))
    names = {
        result: [result.trial.folder.name, str(result.convolutions or '-'), str(result.length)] for result in in_turn
    }
    arms = in_order(arm for result in in_turn for arm in result.choices)
    searched = any(result.search_seconds(arm) for result in in_turn for arm in result.choices)
    head = ['trial', 'convolutions', 'epochs', 'arm', 'lr', 'seeds', 'top-1, 95 %', 'difference, 95 %', 'wall time']
    beside = [
        [*names[result], *(_accuracy(result, arm) if arm in result.choices else '-' for arm in arms)]
        for result in in_turn
    ]
    rows = [
        [*names[result], arm, *_scores(result, arm), _number(result.seconds(arm), '.0f', ' s')]
        for result in in_turn
        for arm in result.choices
    ]
    parts = [
        f'# {len(results)} trials',
        'Top-1 accuracy in percent on the validation images after the last epoch. Differences are from '
        f'{" or ".join(sorted({result.reference for result in results}))}, over paired seeds. Wall time is the '
        f'training time of one run{" and of its search" if searched else ""}.',
        markdown_table([*head[:3], *arms], beside, align=True),
        markdown_table(head, rows, align=True),
    ]
    for result in in_turn:
        parts += [f'## {result.trial.folder.name}', _bullets(_verdict(result))]
    if equal := list(_equal_times(in_turn)):
        parts += ['## Equal wall time', _bullets(equal)]
    alike = len({result.trial.folder.name for result in results}) < len(results)
    values = {str(each.trial.folder) if alike else each.trial.folder.name: _values(each) for each in results}
    return _write(folder, parts, values, results, partial(draw_trials, results))


def _write(
    folder: Path,
    parts: Sequence[str],
    values: dict[str, Any],
    results: Sequence[TrialResult],
    draw: Callable[[Path], Any],
) -> str:
    """Writes the files of a report, and returns its text."""
    text = '\n\n'.join(parts) + '\n'
    write_text(folder / 'report.md', text)
    write_text(folder / 'report.json', json.dumps(_finite(values), indent=2) + '\n')
    tables = [result.epochs.assign(trial=result.trial.folder.name) for result in results]
    epochs = pd.concat([table for table in tables if len(table)] or tables[:1])
    write_text(folder / 'epochs.csv', epochs[['trial', *epochs.columns.drop('trial')]].to_csv(index=False))
    try:
        draw(folder / 'report.png')
    except ImportError as error:
        _logger.warning(f'No picture: {error}')
    return text


def _bullets(sentences: Sequence[str]) -> str:
    return '\n'.join(f'* {sentence}' for sentence in sentences)


def _finite(value: Any) -> Any:
    """Replaces what JSON does not have by null."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _values(result: TrialResult) -> dict[str, Any]:
    arms = {}
    for arm, choice in result.choices.items():
        difference = result.difference(arm)
        arms[arm] = {
            'lr': choice.best,
            'lr_at_edge': choice.at_edge,
            'tuning': result.tuning(arm),
            'top1': result.top1[arm].dropna().to_dict(),
            'mean': asdict(result.mean(arm)),
            'difference': {**asdict(difference), 'lower': difference.lower, 'upper': difference.upper},
            'diverged': result.failures[arm],
            'epoch_seconds': result.epoch_seconds(arm),
            'search_seconds': result.search_seconds(arm),
            **result.networks.get(arm, {}),
        }
    return {
        'settings': {**asdict(result.trial.settings), 'reference': result.reference},
        'epochs': result.trial.shared['epochs'],
        'convolutions': result.convolutions,
        'arms': arms,
        'search': None if result.search is None else vars(result.search),
        'verdict': _verdict(result),
    }


def interval_text(interval: Interval, sign: bool = True) -> str:
    """Formats a mean with its interval, such as `+1.20 (0.30 to 2.10)`; `-` without a value."""
    if not interval.count:
        return '-'
    mean = f'{interval.mean:+.2f}' if sign else f'{interval.mean:.2f}'
    return mean if interval.count == 1 else f'{mean} ({interval.lower:.2f} to {interval.upper:.2f})'


def _accuracy(result: TrialResult, arm: str, mean: Interval | None = None) -> str:
    """Formats the mean accuracy of an arm, and how many of its runs diverged; `-` if none has ended."""
    mean, diverged = mean or result.mean(arm), len(result.failures[arm])
    if result.is_hopeless(arm) or diverged == len(result.top1):
        return 'all diverged'
    text = [interval_text(mean, sign=False)] if mean.count or not diverged else []
    return ', '.join(text + [f'diverged: {diverged}'] * bool(diverged))


def _number(value: float | None, form: str, unit: str = '') -> str:
    return '-' if value is None or math.isnan(value) else f'{value:{form}}{unit}'


def _scores(result: TrialResult, arm: str) -> list[str]:
    """Returns what all tables show of an arm: learning rate, seeds, accuracy and difference."""
    difference = '' if arm == result.reference else interval_text(result.difference(arm))
    return [_number(result.choices[arm].best, 'g'), str(result.mean(arm).count), _accuracy(result, arm), difference]


def _among(*failures: Any) -> str:
    return ', among the seeds that did not diverge' if any(failures) else ''


def _verdict(result: TrialResult) -> list[str]:
    """Returns sentences: each arm against the reference, what failed, what a search did."""
    sentences = [_against(result, arm) for arm in result.choices if arm != result.reference]
    for arm in result.choices:
        sentences += _troubles(result, arm)
    return sentences if result.search is None else [*sentences, result.search.sentence()]


def _against(result: TrialResult, arm: str) -> str:
    difference, reference = result.difference(arm), result.reference
    pair = f'{arm} and {reference}{(among := _among(result.failures[arm], result.failures[reference]))}'
    if not difference.count:
        return f'{arm} and {reference}: no seed with which both are finished.'
    if difference.count == 1:
        return f'{pair}: one seed, {difference.mean:+.2f} points. One seed cannot say how much of that is chance.'
    seeds = f'{difference.count} seeds'
    numbers = f'{difference.mean:+.2f} points, 95 % interval {difference.lower:+.2f} to {difference.upper:+.2f}'
    if difference.excludes_zero:
        better = 'better' if difference.mean > 0 else 'worse'
        return f'{arm} is {better} than {reference} by {abs(difference.mean):.2f} points{among} ({numbers}, {seeds}).'
    text = f'{pair}: no difference that {seeds} can show ({numbers}).'
    if difference.half > _POINTS:
        few, many = seeds_to_show(_POINTS, difference)
        text += f' About {few} seeds would show {_POINTS:g} points, or {many} if the spread is underestimated.'
    return text


def _troubles(result: TrialResult, arm: str) -> list[str]:
    settings, choice = result.trial.settings, result.choices[arm]
    found = [
        f'The search in searches/{folder} diverged, and what needs its scales does not train: {failure} Repeat the '
        f'trial in another --output with gradients clipped, --clip-grad 5, or search beforehand at a lower learning '
        f'rate and give the result, --scales NAME=FILE.'
        for folder, failure in result.search_failures[arm].items()
    ]
    if result.is_hopeless(arm):
        return found or [f'{arm} diverged at every learning rate that was tried.']
    top1 = math.nan if choice.best is None else result.tuning(arm).get(choice.best, math.nan)
    if settings.classes and settings.held_out and is_guessing(top1, settings.classes, settings.held_out):
        found.append(
            f'No learning rate that was tried is known to train {arm}: {top1:.2f} % of {settings.classes} classes at '
            f'{choice.best:g}, the best, does not exceed what guessing may reach on {settings.held_out} held-out '
            f'images.'
        )
    elif choice.at_edge:
        found.append(
            f'The learning rate of {arm}, {choice.best:g}, is at the edge of what was tried: a better one may lie '
            f'beyond.'
        )
    count, diverged, finished = len(result.top1), len(result.failures[arm]), result.mean(arm).count
    if diverged:
        others = '; its mean is that of the others' if finished else ''
        found.append(f'{diverged} of {count} runs of {arm} diverged{others}.')
    if missing := count - finished - diverged:
        found.append(f'{missing} of {count} runs of {arm} are not finished.')
    return found


def _row(result: TrialResult, arm: str) -> list[str]:
    row = [f'{arm}: {arm_of(arm).title}', *_scores(result, arm), _number(result.epoch_seconds(arm), '.1f')]
    costs, base = result.networks.get(arm), result.networks.get(result.reference)
    return [
        *row,
        _number(costs['step_seconds'] / base['step_seconds'], '.2f', ' x') if costs and base else '-',
        _number(costs['activations'] / 1e6, '.2f', ' MB') if costs else '-',
        _number(costs['parameters'] / 1e6, '.2f', ' M') if costs else '-',
    ]


def _time_table(result: TrialResult) -> str:
    """Returns accuracies at the wall time of the fastest arm's runs; nothing if all arms take about as long."""
    times = {arm: result.seconds(arm) for arm in result.choices if result.mean(arm).count}
    times = {arm: seconds for arm, seconds in times.items() if not math.isnan(seconds)}
    if not times or max(times.values()) < _FASTER * min(times.values()):
        return ''
    seconds = min(times.values())
    rows = []
    for arm, whole in times.items():
        reached = result.within(arm, seconds)
        done = 0 if reached.empty else reached['epoch'].max()
        accuracy = _accuracy(result, arm, Interval.of(reached['eval_top1']))
        rows.append([arm, f'{whole:.0f} s', f'{done} of {result.length}', accuracy])
    fastest = ', '.join(arm for arm, each in times.items() if each == seconds)
    title = f'epochs in {seconds:.0f} s ({fastest})'
    return markdown_table(['arm', 'wall time of a run', title, 'top-1 by then, 95 %'], rows, align=True)


def _equal_times(results: Sequence[TrialResult]) -> Iterator[str]:
    """Compares the slowest arm of each trial with the longest runs of other arms that take no more time."""
    seconds = {
        (result, arm): result.seconds(arm) for result in results for arm in result.choices if result.mean(arm).count
    }
    seconds = {run: each for run, each in seconds.items() if not math.isnan(each)}
    for result in dict.fromkeys(result for result, _ in seconds):
        slowest = max((run for run in seconds if run[0] is result), key=lambda run: seconds[run])
        for arm in result.choices:
            rivals = [
                (other, name)
                for other, name in seconds
                if name == arm != slowest[1]
                and other.length > result.length
                and seconds[other, name] <= seconds[slowest] * SAME_TIME
                and _task(other) == _task(result)
            ]
            if not rivals:
                continue
            rival = max(rivals, key=lambda run: seconds[run])
            difference = Interval.of(rival[0].top1[arm] - result.top1[slowest[1]])
            runs = [f'{name} in {each.length} epochs ({seconds[each, name]:.0f} s)' for each, name in (rival, slowest)]
            among = _among(rival[0].failures[arm], result.failures[slowest[1]])
            known = difference.count < 2 or difference.excludes_zero
            yield (
                f'{" and ".join(runs)}{among}: {"" if known else "no difference that the seeds can show, "}'
                f'{interval_text(difference)} points, {difference.count} seeds.'
            )


def _task(result: TrialResult) -> dict[str, Any]:
    """Returns all that runs of several lengths have to have in common."""
    length = ('epochs', 'warmup_epochs', 'val_interval')
    values = {name: value for name, value in protocol(result.trial.shared).items() if name not in length}
    return {**values, 'model': result.trial.settings.model}
