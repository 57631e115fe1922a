"""The results of a trial, from the folders of its runs."""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from ..reparam import Scales
from ..scales import read_scale_file
from ..scales.summary import movement
from ..train.run_folder import SCALES_FILE
from .arms import arm_of
from .networks import make_network, read_networks
from .statistics import Interval
from .trial_folder import Trial, open_trial


class ArmResult:
    """What has come out of an arm so far. Accuracies are in percent, NaN of runs that diverged or are not finished.

    Attributes:
        choice: Its learning rate.
        tuning: Learning rate to accuracy on held-out images.
        top1: Seed to accuracy after the last epoch.
        difference: Mean difference to the reference arm over the seeds that both finished.
        failures: Seeds whose run, or the search before it, diverged, and what with.
        search_failures: Folders of the searches that diverged, and what with.
        costs: What its network costs, see `measure_networks`; nothing if unknown.
        epochs: A row for each epoch of each run.
        epoch_seconds: Median over all arms of its network, as only the machine's other work sets them apart.
        search_seconds: Time of the search before a run, 0 without one; as all times NaN if unknown.
        length: Epochs of a run.
    """

    # Known once all arms are.
    difference: Interval
    epoch_seconds: float

    def __init__(self, trial: Trial, name: str, costs: dict[str, float]):
        self.name, self.costs = name, costs
        self.choice = trial.choice(name)
        self.length: int = trial.shared['epochs'] + trial.shared['cooldown_epochs']
        seeds, best = trial.settings.seeds, self.choice.best
        runs = {seed: trial.training(name, seed, best) for seed in seeds} if best else {}
        self.top1 = pd.Series({seed: run.top1 for seed, run in runs.items()}, seeds, float)
        self.failures = {seed: run.failure for seed, run in runs.items() if run.failure}
        self.epochs = [
            {'arm': name, 'seed': seed, **row, 'epoch': int(row['epoch'])}
            for seed, run in runs.items()
            for row in run.history()
        ]
        rates = sorted(float(path.name.removeprefix('lr-')) for path in (trial.folder / 'tuning' / name).glob('lr-*'))
        self.tuning = {lr: trial.tuning(name, lr).top1 for lr in rates}
        searches = trial.searches(name)
        self.search_failures = {run.folder.name: run.failure for run in searches if run.failure}
        searches = [run for run in searches if run.folder.name != 'tuning']
        seconds = [row.get('train_seconds', math.nan) for run in searches for row in run.history()]
        self.search_seconds = searches[0].epochs * float(pd.Series(seconds, dtype=float).median()) if searches else 0.0

    @property
    def mean(self) -> Interval:
        return Interval.of(self.top1)

    @property
    def is_hopeless(self) -> bool:
        """Whether every learning rate diverged, or the search before all of them."""
        return self.choice.best is None and not self.choice.missing

    @property
    def seconds(self) -> float:
        """Wall time of a run."""
        return self.seconds_of(self.length)

    def seconds_of(self, epochs: Any) -> Any:
        """Wall time of so many epochs of a run, and of the search before it."""
        return self.search_seconds + epochs * self.epoch_seconds


class TrialResult:
    """What has come out of a trial so far.

    Attributes:
        trial: The trial.
        reference: Arm that the others are compared with; by default that of the trial.
        arms: Its arms by name.
        epochs: A row for each epoch of each run: `arm`, `seed`, `epoch`, the columns of `summary.csv`, `train_seconds`.
        length: Epochs of a run.
        convolutions: Number of convolutions of the plain network, 0 if unknown.
        search: What the searches did; None without any.
    """

    def __init__(self, folder: Path, reference: str | None = None):
        self.trial = open_trial(folder)
        settings, networks = self.trial.settings, read_networks(self.trial)
        self.reference = reference or settings.reference
        if self.reference not in settings.arms:
            raise ValueError(f"'{folder}' has no arm {reference}, expected one of {', '.join(settings.arms)}.")
        self.arms = {name: ArmResult(self.trial, name, networks.get(name, {})) for name in settings.arms}
        epochs = pd.DataFrame(row for arm in self.arms.values() for row in arm.epochs)
        needed = ('arm', 'seed', 'epoch', 'train_seconds', 'eval_top1')
        self.epochs = epochs.reindex(columns=list(dict.fromkeys([*epochs.columns, *needed])))
        keys = {name: arm_of(name).network_key for name in self.arms}
        seconds = self.epochs['train_seconds'].groupby(self.epochs['arm'].map(keys)).median()
        for name, arm in self.arms.items():
            arm.difference = Interval.of(arm.top1 - self.arms[self.reference].top1)
            arm.epoch_seconds = float(seconds.get(keys[name], math.nan))
        self.length = self.arms[self.reference].length
        plain = [int(costs['convolutions']) for arm, costs in networks.items() if arm_of(arm).kind == 'target']
        self.convolutions = plain[0] if plain else 0
        found = sorted((folder / 'searches').glob(f'seed-*/{SCALES_FILE}')) if settings.search else []
        self.search = None
        if found:
            initial = Scales.initial(make_network(self.trial))
            self.search = movement([read_scale_file(path) for path in found], initial)

    @property
    def timed(self) -> list[ArmResult]:
        """The arms with finished runs and known times."""
        return [arm for arm in self.arms.values() if arm.mean.count and not math.isnan(arm.seconds)]
