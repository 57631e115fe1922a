"""The results of a trial, from the folders of its runs."""

import argparse
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from ..scales import Scales, read_scale_file
from ..scales.movement import Movement, movement
from ..train.run_folder import SCALES_FILE
from .arms import arm_of
from .intervals import Interval
from .networks import plain_network, read_networks
from .trial_folder import SETTINGS_FILE, read_saved_settings, read_shared
from .trial_plan import choose
from .trial_runs import Outcome, TrialRuns, outcome_of
from .trial_settings import TrialSettings
from .tuning import Choice

__all__ = ['SAME_TIME', 'ArmResult', 'TrialResult', 'open_trial', 'paired', 'read_results']

SAME_TIME = 1.05
"""Times that differ by this factor at most count as equal: they vary from run to run."""


@dataclass(frozen=True)
class ArmResult:
    """What came out of an arm.

    Attributes:
        name: Its name.
        choice: Its learning rate.
        tuning: Learning rate to accuracy on held-out images; NaN if the run diverged or is not finished.
        outcomes: Seed to what has become of the run; runs that have not begun are not there.
        epoch_seconds: Median time of an epoch's training over all runs; NaN if unknown.
        network: What its network costs, see `measure_networks`.
    """

    name: str
    choice: Choice
    tuning: dict[float, float]
    outcomes: dict[int, Outcome]
    epoch_seconds: float
    network: dict[str, float]

    @property
    def title(self) -> str:
        return arm_of(self.name).title

    @property
    def top1(self) -> dict[int, float]:
        """Seed to accuracy after the last epoch, of the runs that finished."""
        return {seed: each.top1 for seed, each in self.outcomes.items() if each.finished}

    @property
    def diverged(self) -> list[int]:
        """Seeds of the runs that diverged."""
        return [seed for seed, each in self.outcomes.items() if each.failure]

    @property
    def hopeless(self) -> bool:
        """Whether every learning rate diverged."""
        return self.choice.best is None and not self.choice.missing

    def top1_within(self, seconds: float) -> dict[int, tuple[int, float]]:
        """Returns seed to the last evaluated epoch that ended within so many seconds of training, and its accuracy."""
        found = {}
        for seed, each in self.outcomes.items():
            rows = [
                row
                for row in each.history
                if 'eval_top1' in row and row['epoch'] * self.epoch_seconds <= seconds * SAME_TIME
            ]
            if each.finished and rows:
                found[seed] = int(rows[-1]['epoch']), rows[-1]['eval_top1']
        return found


@dataclass(frozen=True)
class TrialResult:
    """What came out of a trial.

    Attributes:
        folder: Its folder.
        settings: What it is of.
        shared: What its runs share.
        arms: Name to result.
        search: What the searches did; None without any.
        convolutions: Number of convolutions of the plain network, 0 if unknown.
    """

    folder: Path
    settings: TrialSettings
    shared: argparse.Namespace
    arms: dict[str, ArmResult]
    search: Movement | None
    convolutions: int

    @property
    def reference(self) -> ArmResult:
        return self.arms[self.settings.reference]

    def difference(self, arm: str) -> Interval:
        """Returns the mean difference of an arm to the reference over the seeds that both finished."""
        return paired(self.arms[arm].top1, self.reference.top1)


def paired(first: dict[int, float], second: dict[int, float]) -> Interval:
    """Returns the mean of `first - second` over common seeds, with its interval."""
    return Interval.of([first[seed] - second[seed] for seed in sorted(set(first) & set(second))])


def open_trial(folder: Path) -> TrialRuns:
    """Opens the folder of a trial.

    Raises:
        FileNotFoundError: If it is not one.
    """
    if not (folder / SETTINGS_FILE).is_file():
        raise FileNotFoundError(f"'{folder}' is not the folder of a trial: it has no {SETTINGS_FILE}.")
    return TrialRuns(folder, read_saved_settings(folder), read_shared(folder))


def read_results(folder: Path, reference: str | None = None) -> TrialResult:
    """Reads what has come out of a trial so far.

    Args:
        folder: Its folder.
        reference: Arm that the others are compared with. Defaults to that of the trial.

    Raises:
        FileNotFoundError: If it is not the folder of a trial.
        ValueError: If the trial does not have the reference arm.
    """
    runs = open_trial(folder)
    settings = runs.settings
    networks = read_networks(folder)
    arms = {name: _arm(runs, name, networks.get(name, {})) for name in settings.arms}
    if reference is not None and reference not in arms:
        raise ValueError(f"'{folder}' has no arm {reference}, expected one of {', '.join(arms)}.")
    if reference is not None:
        settings = replace(settings, reference=reference)
    plain = [each for name, each in networks.items() if arm_of(name).kind == 'target']
    convolutions = int(plain[0]['convolutions']) if plain else 0
    return TrialResult(folder, settings, runs.shared, arms, _search(runs), convolutions)


def _arm(runs: TrialRuns, name: str, network: dict[str, float]) -> ArmResult:
    choice = choose(runs, name)
    outcomes: dict[int, Outcome] = {}
    for seed in runs.settings.seeds:
        if choice.best is None:
            break
        outcome = runs.training(name, seed, choice.best).outcome
        if outcome.history or outcome.failure:
            outcomes[seed] = outcome
    seconds = [row['train_seconds'] for each in outcomes.values() for row in each.history if 'train_seconds' in row]
    tuned = {
        float(folder.name.removeprefix('lr-')): outcome_of(folder, runs.settings.tuning_epochs).top1
        for folder in sorted((runs.folder / 'tuning' / name).glob('lr-*'))
    }
    return ArmResult(name, choice, tuned, outcomes, statistics.median(seconds) if seconds else math.nan, network)


def _search(runs: TrialRuns) -> Movement | None:
    if runs.settings.search is None:
        return None
    found = sorted((runs.folder / 'searches').glob(f'seed-*/{SCALES_FILE}'))
    if not found:
        return None
    return movement([read_scale_file(path) for path in found], Scales.initial(plain_network(runs)))
