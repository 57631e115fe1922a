"""What a trial does next, from what its folder holds."""

from collections.abc import Iterator

from .trial_runs import Run, TrialRuns
from .tuning import Choice, choose_rate

__all__ = ['choose', 'open_runs']


def choose(runs: TrialRuns, arm: str) -> Choice:
    """Returns what is known of an arm's learning rate."""
    settings = runs.settings
    if settings.lr is not None:
        return Choice((), settings.lr)
    scores: dict[float, float] = {}
    while True:
        choice = choose_rate(settings.lrs, scores)
        outcomes = {lr: runs.tuning(arm, lr).outcome for lr in choice.missing}
        found = {lr: each.top1 for lr, each in outcomes.items() if each.finished or each.failure}
        scores |= found
        if not choice.missing:
            return choice
        if len(found) < len(choice.missing):
            return Choice(tuple(lr for lr in choice.missing if lr not in found))


def open_runs(runs: TrialRuns) -> list[Run]:
    """Lists the runs that are neither finished nor diverged and that can start, the most urgent first.

    Learning rates come first, as the other runs wait for them, then seed after seed, so that all arms of a seed are
    there early.
    """
    waiting = [run for run in _wanted(runs) if not _ended(run)]
    ready = [run.after if run.after is not None and not _ended(run.after) else run for run in waiting]
    failed = {run for run in ready if run.after is not None and run.after.outcome.failure}
    return [run for run in dict.fromkeys(ready) if run not in failed]


def _wanted(runs: TrialRuns) -> Iterator[Run]:
    choices = {arm: choose(runs, arm) for arm in runs.settings.arms}
    for arm, choice in choices.items():
        yield from (runs.tuning(arm, lr) for lr in choice.missing)
    for seed in runs.settings.seeds:
        for arm, choice in choices.items():
            if choice.best is not None:
                yield runs.training(arm, seed, choice.best)


def _ended(run: Run) -> bool:
    outcome = run.outcome
    return outcome.finished or bool(outcome.failure)
