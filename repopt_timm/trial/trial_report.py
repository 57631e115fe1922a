"""The report of a trial, or of several: tables, verdict, JSON, CSV and a picture."""

import csv
import io
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..files import write_text
from .combined import combined_report, draw_trials
from .intervals import Interval
from .results import ArmResult, TrialResult
from .trial_pictures import draw_trial
from .verdict import arms_table, time_table, verdict

__all__ = ['REPORT_NAME', 'report_trial', 'report_trials', 'trial_text']

REPORT_NAME = 'report'

_logger = logging.getLogger(__name__)


def report_trial(trial: TrialResult) -> str:
    """Writes `report.md`, `report.json`, `epochs.csv` and `report.png` into a trial's folder.

    Returns:
        The report as Markdown.
    """
    text = trial_text(trial)
    write_text(trial.folder / f'{REPORT_NAME}.md', text)
    write_text(trial.folder / f'{REPORT_NAME}.json', json.dumps(_finite(_values(trial)), indent=2) + '\n')
    write_text(trial.folder / 'epochs.csv', _epochs([trial]))
    _try_to_draw(partial(draw_trial, trial), trial.folder)
    return text


def report_trials(trials: Sequence[TrialResult], folder: Path) -> str:
    """Writes one report of several trials: `report.md`, `report.json`, `epochs.csv` and `report.png`.

    Returns:
        The report as Markdown.
    """
    text = combined_report(trials)
    write_text(folder / f'{REPORT_NAME}.md', text)
    names = [trial.folder.name for trial in trials]
    alike = len(set(names)) < len(names)
    values = {str(trial.folder) if alike else trial.folder.name: _values(trial) for trial in trials}
    write_text(folder / f'{REPORT_NAME}.json', json.dumps(_finite(values), indent=2) + '\n')
    write_text(folder / 'epochs.csv', _epochs(trials))
    _try_to_draw(partial(draw_trials, trials), folder)
    return text


def _try_to_draw(draw: Callable[[Path], Any], folder: Path) -> None:
    try:
        draw(folder / f'{REPORT_NAME}.png')
    except ImportError as error:
        _logger.warning(f'No picture: {error}')


def trial_text(trial: TrialResult) -> str:
    """Returns the report of a trial as Markdown."""
    shared, settings = trial.shared, trial.settings
    what = [f'{shared.epochs} epochs', f'batch {shared.batch_size}', f'seeds {", ".join(map(str, settings.seeds))}']
    if shared.train_images:
        what.append(f'{shared.train_images} training images')
    if shared.model_kwargs:
        what.append(', '.join(f'{name}={value}' for name, value in shared.model_kwargs.items()))
    how = f'All arms at learning rate {settings.lr:g}.' if settings.lr is not None else _tuning_text(trial)
    parts = [
        f'# {settings.model} on {Path(shared.data_dir or shared.dataset).name}',
        f'{"; ".join(what)}. {how} Top-1 accuracy in percent on the validation images after the last epoch.',
        arms_table(trial),
        '\n'.join(f'* {sentence}' for sentence in verdict(trial)),
    ]
    if times := time_table(trial):
        parts += [
            'At equal wall time of training, from the curves; a run that is cut off has not finished lowering its '
            'learning rate, so that a run planned for that time would do better:',
            times,
        ]
    return '\n\n'.join(parts) + '\n'


def _tuning_text(trial: TrialResult) -> str:
    settings = trial.settings
    return (
        f'Learning rates: the best in runs of {settings.tuning_epochs} epochs on a held-out {settings.holdout:.0%} of '
        f'the training images, from {", ".join(f"{lr:g}" for lr in settings.lrs)} and beyond.'
    )


def _values(trial: TrialResult) -> dict[str, Any]:
    return {
        'settings': asdict(trial.settings),
        'epochs': trial.shared.epochs,
        'convolutions': trial.convolutions,
        'arms': {name: _arm_values(trial, arm) for name, arm in trial.arms.items()},
        'search': None if trial.search is None else asdict(trial.search),
        'verdict': verdict(trial),
    }


def _arm_values(trial: TrialResult, arm: ArmResult) -> dict[str, Any]:
    difference = trial.difference(arm.name)
    return {
        'lr': arm.choice.best,
        'lr_at_edge': arm.choice.at_edge,
        'tuning': arm.tuning,
        'top1': arm.top1,
        'mean': asdict(Interval.of(list(arm.top1.values()))),
        'difference': {**asdict(difference), 'lower': difference.lower, 'upper': difference.upper},
        'diverged': {seed: each.failure for seed, each in arm.outcomes.items() if each.failure},
        'epoch_seconds': arm.epoch_seconds,
        'search_seconds': arm.search_seconds,
        **arm.network,
    }


def _finite(value: Any) -> Any:
    """Replaces what JSON does not have by null."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _epochs(trials: Sequence[TrialResult]) -> str:
    rows = [
        {'trial': trial.folder.name, 'arm': arm.name, 'seed': seed, **row}
        for trial in trials
        for arm in trial.arms.values()
        for seed, outcome in arm.outcomes.items()
        for row in outcome.history
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
