"""The runs of a trial and their folders, which are ordinary ones of the training command.

    trial.yaml, shared.yaml                what the trial is of, and what its runs share
    tuning/<arm>/lr-<lr>/                  one run for each learning rate, on a part of the training images
    searches/tuning/, searches/seed-<n>/   hyper-searches
    runs/<arm>/seed-<n>/                   what the trial is for

Each holds `config.yaml` and `train.log` beside the files of a run. All that a trial knows of its progress is read from
there.
"""

import argparse
import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..names import ModelName
from ..train.run_folder import DIVERGED_FILE, SCALES_FILE, SUMMARY_FILE, TIMES_FILE
from .arms import GIVEN, SEARCHED, arm_of
from .trial_settings import TrialSettings

__all__ = ['CONFIG_FILE', 'LOG_FILE', 'Outcome', 'Run', 'TrialRuns', 'outcome_of']

CONFIG_FILE = 'config.yaml'
LOG_FILE = 'train.log'


@dataclass(frozen=True)
class Run:
    """A run of the training command.

    Attributes:
        folder: Its folder.
        epochs: Epochs that it has in the end.
        arguments: What it does not share with the other runs.
        after: A run that it needs the result of.
        keep_checkpoints: Whether its checkpoints are worth keeping once it is finished.
        result: File that it writes last of all.
    """

    folder: Path
    epochs: int
    arguments: Mapping[str, Any] = field(hash=False)
    after: 'Run | None' = None
    keep_checkpoints: bool = True
    result: Path | None = None

    @property
    def outcome(self) -> 'Outcome':
        """What has become of it, as its folder says."""
        outcome = outcome_of(self.folder, self.epochs)
        if self.result is not None and not self.result.exists():
            return replace(outcome, finished=False)
        return outcome


@dataclass(frozen=True)
class Outcome:
    """What has become of a run.

    Attributes:
        history: A row for each finished epoch: the columns of `summary.csv`, and `train_seconds`.
        finished: Whether all epochs are trained.
        failure: What it diverged with.
    """

    history: list[dict[str, float]]
    finished: bool = False
    failure: str = ''

    @property
    def top1(self) -> float:
        """Top-1 accuracy after the last epoch, in percent; NaN if the run diverged or is not finished."""
        return self.history[-1]['eval_top1'] if self.finished else math.nan


def outcome_of(folder: Path, epochs: int) -> Outcome:
    """Reads what has become of the run of so many epochs in a folder."""
    rows = _table(folder / SUMMARY_FILE)
    # An epoch that was repeated after an interruption has a second line.
    seconds = {row['epoch']: row['train_seconds'] for row in _table(folder / TIMES_FILE)}
    for row in rows:
        row |= {'train_seconds': seconds[row['epoch']]} if row['epoch'] in seconds else {}
    failure = ''
    if (folder / DIVERGED_FILE).exists():
        failure = (folder / DIVERGED_FILE).read_text(encoding='utf-8').strip()
    return Outcome(rows, len(rows) >= epochs and not failure, failure)


def _table(path: Path) -> list[dict[str, float]]:
    try:
        with open(path, encoding='utf-8', newline='') as file:
            return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []


class TrialRuns:
    """Makes the runs of a trial.

    Args:
        folder: Folder of the trial.
        settings: What the trial is of.
        shared: What its runs share, as arguments of a run.
    """

    def __init__(self, folder: Path, settings: TrialSettings, shared: argparse.Namespace):
        self.folder = folder
        self.settings = settings
        self.shared = shared

    def training(self, arm: str, seed: int, lr: float) -> Run:
        """Returns the run of an arm with a seed."""
        after = self.search(f'seed-{seed}', seed) if arm_of(arm).scales == SEARCHED else None
        arguments = {**self._model(arm, after), 'lr': lr, 'seed': seed}
        return self._run(self.folder / 'runs' / arm / f'seed-{seed}', self.shared.epochs, arguments, after)

    def tuning(self, arm: str, lr: float) -> Run:
        """Returns the run that shows what a learning rate is worth."""
        settings = self.settings
        after = None
        if arm_of(arm).scales == SEARCHED:
            after = self.search('tuning', settings.tuning_seed, holdout=settings.holdout)
        arguments = {
            **self._model(arm, after),
            'lr': lr,
            'seed': settings.tuning_seed,
            'holdout': settings.holdout,
            'val_interval': settings.tuning_epochs,
        }
        folder = self.folder / 'tuning' / arm / f'lr-{lr:g}'
        return self._run(folder, settings.tuning_epochs, arguments, after, keep_checkpoints=False)

    def search(self, name: str, seed: int, **arguments: Any) -> Run:
        """Returns a hyper-search."""
        assert self.settings.search is not None
        arguments = {'model': self.settings.model + '_hs', 'opt': 'sgd', 'seed': seed, **arguments}
        arguments |= self.settings.search_kwargs
        folder = self.folder / 'searches' / name
        run = self._run(folder, self.settings.search, arguments)
        return replace(run, result=folder / SCALES_FILE)

    def _model(self, arm: str, search: Run | None) -> dict[str, Any]:
        each = arm_of(arm)
        model = ModelName.parse(self.settings.model).of_kind(each.kind)
        scales: str | None = each.scales
        if each.scales == GIVEN:
            scales = self.settings.scales[arm]
        elif search is not None:
            scales = str(search.folder / SCALES_FILE)
        arguments: dict[str, Any] = {'model': model, 'opt': each.opt, **({'scales': scales} if scales else {})}
        if each.model_kwargs:
            arguments['model_kwargs'] = {**self.shared.model_kwargs, **each.model_kwargs}
        return arguments

    def _run(
        self,
        folder: Path,
        epochs: int,
        arguments: dict[str, Any],
        after: Run | None = None,
        keep_checkpoints: bool = True,
    ) -> Run:
        epochs = arguments.get('epochs', epochs)
        # A shorter schedule has the same shape.
        warmup = round(self.shared.warmup_epochs * epochs / self.shared.epochs)
        if self.shared.warmup_epochs and epochs > 1:
            warmup = max(1, warmup)
        arguments = {'epochs': epochs, 'warmup_epochs': warmup, **arguments}
        epochs += arguments.get('cooldown_epochs', self.shared.cooldown_epochs)
        return Run(folder, epochs, arguments, after, keep_checkpoints)
