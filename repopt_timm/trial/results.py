"""The results of a trial, from the folders of its runs."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..reparam import Scales
from ..scales import read_scale_file
from ..scales.summary import Movement, movement
from ..train.run_folder import SCALES_FILE
from .arms import arm_of
from .networks import make_network, read_networks
from .statistics import Choice, Interval
from .trial_folder import Trial, open_trial


@dataclass(frozen=True, eq=False)
class ArmResult:
    """What has come out of an arm so far. Accuracies are in percent, NaN of runs that diverged or are not finished.

    Attributes:
        tuning: Learning rate to accuracy on held-out images.
        top1: Seed to accuracy after the last epoch.
        difference: Mean difference to the reference arm over the seeds that both finished.
        failures: Seeds whose run, or the search before it, diverged, and what with.
        search_failures: Folders of the searches that diverged, and what with.
        costs: What its network costs, see `measure_networks`; nothing if unknown.
        epoch_seconds: Median over all arms of its network, as only the machine's other work sets them apart.
        search_seconds: Time of the search before a run, 0 without one; as all times NaN if unknown.
        length: Epochs of a run.
    """

    name: str
    choice: Choice
    tuning: dict[float, float]
    top1: pd.Series
    difference: Interval
    failures: dict[int, str]
    search_failures: dict[str, str]
    costs: dict[str, float]
    epoch_seconds: float
    search_seconds: float
    length: int

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


@dataclass(frozen=True, eq=False)
class TrialResult:
    """What has come out of a trial so far.

    `epochs` has a row for each epoch of each run: `arm`, `seed`, `epoch`, the columns of `summary.csv`,
    `train_seconds`. `length` are the epochs of a run; `convolutions`, of the plain network, are 0 if unknown.
    """

    trial: Trial
    reference: str
    arms: dict[str, ArmResult]
    epochs: pd.DataFrame
    length: int
    convolutions: int
    search: Movement | None

    @property
    def timed(self) -> list[ArmResult]:
        """The arms with finished runs and known times."""
        return [arm for arm in self.arms.values() if arm.mean.count and not math.isnan(arm.seconds)]


def read_results(folder: Path, reference: str | None = None) -> TrialResult:
    """Reads what has come out of the trial in a folder; the reference arm is by default that of the trial."""
    trial = open_trial(folder)
    settings, networks = trial.settings, read_networks(trial)
    reference = reference or settings.reference
    if reference not in settings.arms:
        raise ValueError(f"'{folder}' has no arm {reference}, expected one of {', '.join(settings.arms)}.")
    choices = {arm: trial.choice(arm) for arm in settings.arms}
    runs = {
        arm: {seed: trial.training(arm, seed, choice.best) for seed in settings.seeds} if choice.best else {}
        for arm, choice in choices.items()
    }
    top1 = pd.DataFrame({arm: {seed: run.top1 for seed, run in own.items()} for arm, own in runs.items()}, dtype=float)
    top1 = top1.reindex(index=settings.seeds)
    epochs = pd.DataFrame(
        {'arm': arm, 'seed': seed, **row, 'epoch': int(row['epoch'])}
        for arm, own in runs.items()
        for seed, run in own.items()
        for row in run.history()
    )
    needed = ('arm', 'seed', 'epoch', 'train_seconds', 'eval_top1')
    epochs = epochs.reindex(columns=list(dict.fromkeys([*epochs.columns, *needed])))
    networks_of = {arm: arm_of(arm).network_key for arm in settings.arms}
    epoch_seconds = epochs['train_seconds'].groupby(epochs['arm'].map(networks_of)).median()
    length = trial.shared['epochs'] + trial.shared['cooldown_epochs']
    arms = {}
    for arm in settings.arms:
        rates = sorted(float(path.name.removeprefix('lr-')) for path in (folder / 'tuning' / arm).glob('lr-*'))
        arms[arm] = ArmResult(
            name=arm,
            choice=choices[arm],
            tuning={lr: trial.tuning(arm, lr).top1 for lr in rates},
            top1=top1[arm],
            difference=Interval.of(top1[arm] - top1[reference]),
            failures={seed: run.failure for seed, run in runs[arm].items() if run.failure},
            search_failures={run.folder.name: run.failure for run in trial.searches(arm) if run.failure},
            costs=networks.get(arm, {}),
            epoch_seconds=float(epoch_seconds.get(networks_of[arm], math.nan)),
            search_seconds=_search_seconds(trial, arm),
            length=length,
        )
    plain = [int(costs['convolutions']) for arm, costs in networks.items() if arm_of(arm).kind == 'target']
    return TrialResult(trial, reference, arms, epochs, length, plain[0] if plain else 0, _search(trial))


def _search_seconds(trial: Trial, arm: str) -> float:
    searches = [run for run in trial.searches(arm) if run.folder.name != 'tuning']
    seconds = [row.get('train_seconds', math.nan) for run in searches for row in run.history()]
    return searches[0].epochs * float(pd.Series(seconds, dtype=float).median()) if searches else 0.0


def _search(trial: Trial) -> Movement | None:
    found = sorted((trial.folder / 'searches').glob(f'seed-*/{SCALES_FILE}')) if trial.settings.search else []
    if not found:
        return None
    return movement([read_scale_file(path) for path in found], Scales.initial(make_network(trial)))
