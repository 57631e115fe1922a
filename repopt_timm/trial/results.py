"""The results of a trial, from the folders of its runs."""

import argparse
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..scales import Scales, read_scale_file
from ..scales.summary import Movement, movement
from ..train.run_folder import SCALES_FILE
from .arms import arm_of
from .intervals import Interval
from .networks import plain_network, read_networks
from .trial_folder import SETTINGS_FILE, read_saved_settings, read_shared
from .trial_plan import choose
from .trial_runs import Outcome, Run, TrialRuns
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
        outcomes: Seed to what has become of the run; runs that have not begun are not there, and one whose search
            diverged has diverged as well.
        search_failures: Folder of a search that diverged, to what it diverged with.
        epoch_seconds: Median time of an epoch's training over all runs of the arm's network; NaN if unknown.
        search_seconds: Time of the search that precedes a run, 0 without one; NaN if unknown.
        network: What its network costs, see `measure_networks`.
    """

    name: str
    choice: Choice
    tuning: dict[float, float]
    outcomes: dict[int, Outcome]
    search_failures: dict[str, str]
    epoch_seconds: float
    search_seconds: float
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
        """Whether every learning rate diverged, or the search before all of them."""
        return self.choice.best is None and (not self.choice.missing or 'tuning' in self.search_failures)

    def seconds(self, epochs: float) -> float:
        """Returns the time in which a run trains so many epochs, its search included; NaN if unknown."""
        return self.search_seconds + epochs * self.epoch_seconds

    def top1_within(self, seconds: float) -> dict[int, tuple[int, float]]:
        """Returns seed to the last evaluated epoch that ended within so many seconds, and its accuracy."""
        found = {}
        for seed, each in self.outcomes.items():
            rows = [
                row for row in each.history if 'eval_top1' in row and self.seconds(row['epoch']) <= seconds * SAME_TIME
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
        raise FileNotFoundError(
            f"'{folder}' is not the folder of a trial: it has no {SETTINGS_FILE}.{_trials_within(folder)}"
        )
    return TrialRuns(folder, read_saved_settings(folder), read_shared(folder))


def _trials_within(folder: Path) -> str:
    found = sorted(path.parent.name for path in folder.glob(f'*/{SETTINGS_FILE}'))
    return f" It holds {', '.join(found)}, which are: name them, such as '{folder / found[0]}'." if found else ''


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
    arms = _read_arms(runs, networks)
    if reference is not None and reference not in arms:
        raise ValueError(f"'{folder}' has no arm {reference}, expected one of {', '.join(arms)}.")
    if reference is not None:
        settings = replace(settings, reference=reference)
    plain = [each for name, each in networks.items() if arm_of(name).kind == 'target']
    convolutions = int(plain[0]['convolutions']) if plain else 0
    return TrialResult(folder, settings, runs.shared, arms, _search(runs), convolutions)


def _read_arms(runs: TrialRuns, networks: Mapping[str, dict[str, float]]) -> dict[str, ArmResult]:
    choices = {name: choose(runs, name) for name in runs.settings.arms}
    outcomes = {name: _outcomes(runs, name, choice.best) for name, choice in choices.items()}
    return {
        name: ArmResult(
            name=name,
            choice=choice,
            tuning=_tuned(runs, name),
            outcomes=outcomes[name],
            search_failures=_search_failures(runs, name),
            epoch_seconds=_epoch_seconds(outcomes, arm_of(name).network_key),
            search_seconds=_search_seconds(runs, name),
            network=networks.get(name, {}),
        )
        for name, choice in choices.items()
    }


def _outcomes(runs: TrialRuns, arm: str, lr: float | None) -> dict[int, Outcome]:
    if lr is None:
        return {}
    found = {}
    for seed in runs.settings.seeds:
        run = runs.training(arm, seed, lr)
        outcome = run.outcome
        if run.after is not None and (failure := run.after.outcome.failure):
            outcome = replace(outcome, failure=f'Its search diverged: {failure}')
        if outcome.history or outcome.failure:
            found[seed] = outcome
    return found


def _tuned(runs: TrialRuns, arm: str) -> dict[float, float]:
    rates = [float(folder.name.removeprefix('lr-')) for folder in (runs.folder / 'tuning' / arm).glob('lr-*')]
    return {lr: runs.tuning(arm, lr).outcome.top1 for lr in sorted(rates)}


def _epoch_seconds(outcomes: Mapping[str, Mapping[int, Outcome]], network_key: str) -> float:
    """Returns the median over all arms of a network: what sets them apart is what else the machine did meanwhile."""
    alike = [
        outcome
        for arm, found in outcomes.items()
        if arm_of(arm).network_key == network_key
        for outcome in found.values()
    ]
    return _median_seconds(alike)


def _search_seconds(runs: TrialRuns, arm: str) -> float:
    searches = _searches(runs, arm)
    return searches[0].epochs * _median_seconds(run.outcome for run in searches) if searches else 0.0


def _search_failures(runs: TrialRuns, arm: str) -> dict[str, str]:
    tuning = runs.tuning(arm, runs.settings.lrs[0]).after if runs.settings.lr is None else None
    searches = [*([] if tuning is None else [tuning]), *_searches(runs, arm)]
    return {run.folder.name: failure for run in searches if (failure := run.outcome.failure)}


def _searches(runs: TrialRuns, arm: str) -> list[Run]:
    runs_of_seeds = [runs.training(arm, seed, runs.settings.lrs[0]) for seed in runs.settings.seeds]
    return [run.after for run in runs_of_seeds if run.after is not None]


def _median_seconds(outcomes: Iterable[Outcome]) -> float:
    seconds = [row['train_seconds'] for each in outcomes for row in each.history if 'train_seconds' in row]
    return statistics.median(seconds) if seconds else math.nan


def _search(runs: TrialRuns) -> Movement | None:
    if runs.settings.search is None:
        return None
    found = sorted((runs.folder / 'searches').glob(f'seed-*/{SCALES_FILE}'))
    if not found:
        return None
    return movement([read_scale_file(path) for path in found], Scales.initial(plain_network(runs)))
