"""The results of a trial, from the folders of its runs."""

import math
from functools import cached_property
from pathlib import Path

import pandas as pd

from ..reparam import Scales
from ..scales import read_scale_file
from ..scales.summary import Movement, movement
from ..train.run_folder import SCALES_FILE
from .arms import arm_of
from .intervals import Interval
from .networks import make_network, read_networks
from .trial_folder import open_trial

__all__ = ['SAME_TIME', 'TrialResult']

SAME_TIME = 1.05
"""Times that differ by this factor at most count as equal: they vary from run to run."""


class TrialResult:
    """What has come out of a trial so far.

    Args:
        folder: Folder of the trial.
        reference: Arm that the others are compared with. Defaults to that of the trial.

    Attributes:
        trial: The trial.
        reference: The reference arm.
        choices: Arm to its learning rate.
        epochs: A row for each epoch of each run: `arm`, `seed`, `epoch`, the columns of `summary.csv`, `train_seconds`.
        top1: Accuracy after the last epoch in percent, seeds by arms; NaN if a run diverged or is not finished.
        failures: Arm to the seeds whose run, or the search before it, diverged, and what with.
        search_failures: Arm to the folders of the searches that diverged, and what with.
        networks: Arm to what its network costs, see `measure_networks`.

    Raises:
        FileNotFoundError: If it is not the folder of a trial.
        ValueError: If the trial does not have the reference arm, or a file in it is damaged.
    """

    def __init__(self, folder: Path, reference: str | None = None):
        self.trial = trial = open_trial(folder)
        arms, seeds = trial.settings.arms, trial.settings.seeds
        self.reference = reference or trial.settings.reference
        if self.reference not in arms:
            raise ValueError(f"'{folder}' has no arm {self.reference}, expected one of {', '.join(arms)}.")
        self.choices = {arm: trial.choice(arm) for arm in arms}
        self.networks = read_networks(trial)
        self.top1 = pd.DataFrame(index=list(seeds), columns=list(arms), dtype=float)
        self.failures: dict[str, dict[int, str]] = {arm: {} for arm in arms}
        self.search_failures = {
            arm: {run.folder.name: run.failure for run in reversed(trial.searches(arm)) if run.failure} for arm in arms
        }
        rows = []
        for arm, choice in self.choices.items():
            for seed in seeds if choice.best is not None else ():
                run = trial.training(arm, seed, choice.best or 0.0)
                rows += [{'arm': arm, 'seed': seed, **row, 'epoch': int(row['epoch'])} for row in run.history()]
                self.top1.loc[seed, arm] = math.nan if run.top1 is None else run.top1
                if run.after is not None and run.after.failure:
                    self.failures[arm][seed] = f'Its search diverged: {run.after.failure}'
                elif run.failure:
                    self.failures[arm][seed] = run.failure
        found = pd.DataFrame(rows)
        needed = ('arm', 'seed', 'epoch', 'train_seconds', 'eval_top1')
        self.epochs = found.reindex(columns=list(dict.fromkeys([*found.columns, *needed])))

    @property
    def length(self) -> int:
        """Epochs of a run."""
        epochs: int = self.trial.shared['epochs'] + self.trial.shared['cooldown_epochs']
        return epochs

    @property
    def convolutions(self) -> int:
        """Number of convolutions of the plain network, 0 if unknown."""
        plain = [costs for arm, costs in self.networks.items() if arm_of(arm).kind == 'target']
        return int(plain[0]['convolutions']) if plain else 0

    def mean(self, arm: str) -> Interval:
        """Returns the mean accuracy of the runs of an arm that finished."""
        return Interval.of(self.top1[arm])

    def difference(self, arm: str) -> Interval:
        """Returns the mean difference of an arm to the reference over the seeds that both finished."""
        return Interval.of(self.top1[arm] - self.top1[self.reference])

    def is_hopeless(self, arm: str) -> bool:
        """Returns whether every learning rate of an arm diverged, or the search before all of them."""
        choice = self.choices[arm]
        return choice.best is None and (not choice.missing or 'tuning' in self.search_failures[arm])

    def epoch_seconds(self, arm: str) -> float:
        """Returns the median time of an epoch's training over all arms of a network; NaN if unknown.

        What sets those apart is what else the machine did meanwhile.
        """
        alike = [name for name in self.choices if arm_of(name).network_key == arm_of(arm).network_key]
        return float(self.epochs.loc[self.epochs['arm'].isin(alike), 'train_seconds'].median())

    def search_seconds(self, arm: str) -> float:
        """Returns the time of the search that precedes a run, 0 without one; NaN if unknown."""
        searches = [run for run in self.trial.searches(arm) if run.folder.name != 'tuning']
        seconds = [row.get('train_seconds', math.nan) for run in searches for row in run.history()]
        return searches[0].epochs * float(pd.Series(seconds, dtype=float).median()) if searches else 0.0

    def seconds(self, arm: str, epochs: float | None = None) -> float:
        """Returns the time in which a run trains so many epochs, or all, its search included; NaN if unknown."""
        return self.search_seconds(arm) + (self.length if epochs is None else epochs) * self.epoch_seconds(arm)

    def within(self, arm: str, seconds: float) -> pd.DataFrame:
        """Returns the last evaluated epoch of each finished run that ended within so many seconds."""
        rows = self.epochs[self.epochs['arm'] == arm].dropna(subset='eval_top1')
        rows = rows[rows['seed'].isin(self.top1[arm].dropna().index)]
        return rows[self.seconds(arm, rows['epoch']) <= seconds * SAME_TIME].groupby('seed').last()

    def tuning(self, arm: str) -> dict[float, float]:
        """Returns learning rate to accuracy on held-out images; NaN if the run diverged or is not finished."""
        folders = (self.trial.folder / 'tuning' / arm).glob('lr-*')
        rates = sorted(float(folder.name.removeprefix('lr-')) for folder in folders)
        found = {lr: self.trial.tuning(arm, lr).top1 for lr in rates}
        return {lr: math.nan if top1 is None else top1 for lr, top1 in found.items()}

    @cached_property
    def search(self) -> Movement | None:
        """What the searches did; None without any."""
        trial = self.trial
        found = sorted((trial.folder / 'searches').glob(f'seed-*/{SCALES_FILE}')) if trial.settings.search else []
        if not found:
            return None
        return movement([read_scale_file(path) for path in found], Scales.initial(make_network(trial)))
