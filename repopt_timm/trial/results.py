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
    """What has come out of an arm so far; accuracies are in percent, NaN of runs that diverged or are not finished."""

    # Known once all arms are: over the seeds that both finished, and the median over all arms of its network, as only
    # the machine's other work sets them apart.
    difference: Interval
    epoch_seconds: float

    def __init__(self, trial: Trial, name: str, costs: dict[str, float]):
        self.name, self.costs, self.length = name, costs, trial.shared['epochs']
        self.choice = trial.choice(name)
        seeds, best = trial.seeds, self.choice.best
        runs = {seed: trial.training(name, seed, best) for seed in seeds} if best else {}
        self.top1 = pd.Series({seed: run.top1 for seed, run in runs.items()}, seeds, float)
        self.mean = Interval.of(self.top1)
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
        # NaN if unknown, like all times.
        self.search_seconds = searches[0].epochs * float(pd.Series(seconds, dtype=float).median()) if searches else 0.0

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
    """What has come out of a trial so far; differences are to `reference`, by default that of the trial."""

    def __init__(self, folder: Path, reference: str | None = None):
        self.trial = open_trial(folder)
        networks = read_networks(self.trial)
        self.reference = reference or self.trial.reference
        if self.reference not in self.trial.arms:
            raise ValueError(f"'{folder}' has no arm {reference}, expected one of {', '.join(self.trial.arms)}.")
        self.arms = {name: ArmResult(self.trial, name, networks.get(name, {})) for name in self.trial.arms}
        epochs = pd.DataFrame(row for arm in self.arms.values() for row in arm.epochs)
        needed = ('arm', 'seed', 'epoch', 'train_seconds', 'eval_top1')
        # A row for each epoch of each run.
        self.epochs = epochs.reindex(columns=list(dict.fromkeys([*epochs.columns, *needed])))
        keys = {name: arm_of(name).network_key for name in self.arms}
        seconds = self.epochs['train_seconds'].groupby(self.epochs['arm'].map(keys)).median()
        for name, arm in self.arms.items():
            arm.difference = Interval.of(arm.top1 - self.arms[self.reference].top1)
            arm.epoch_seconds = float(seconds.get(keys[name], math.nan))
        self.timed = [arm for arm in self.arms.values() if arm.mean.count and not math.isnan(arm.seconds)]
        # 0 if unknown.
        plain = [int(costs['convolutions']) for arm, costs in networks.items() if arm_of(arm).kind == 'target']
        self.convolutions = plain[0] if plain else 0
        found = sorted((folder / 'searches').glob(f'seed-*/{SCALES_FILE}')) if self.trial.search else []
        self.search = None
        if found:
            self.search = movement(list(map(read_scale_file, found)), Scales.initial(make_network(self.trial)))
