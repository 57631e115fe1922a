"""What a trial shows, in tables and in plain words."""

import math
from collections.abc import Sequence

from ..reporting import markdown_table
from .intervals import Interval
from .results import ArmResult, TrialResult
from .tuning import is_guessing

__all__ = ['accuracy_text', 'among_text', 'arms_table', 'interval_text', 'time_table', 'verdict']


# On a busy machine less is chance.
_FASTER = 1.15


def interval_text(interval: Interval, sign: bool = True) -> str:
    """Formats a mean with its interval, such as `+1.20 (0.30 to 2.10)`."""
    if not interval.count:
        return '-'
    mean = f'{interval.mean:+.2f}' if sign else f'{interval.mean:.2f}'
    return mean if interval.count == 1 else f'{mean} ({interval.lower:.2f} to {interval.upper:.2f})'


def accuracy_text(trial: TrialResult, arm: ArmResult) -> str:
    """Formats the mean accuracy of an arm, and how many of its runs diverged; `-` if none has ended."""
    if arm.hopeless or len(arm.diverged) == len(trial.settings.seeds):
        return 'all diverged'
    return _with_diverged(list(arm.top1.values()), arm)


def _with_diverged(top1: Sequence[float], arm: ArmResult) -> str:
    mean = [interval_text(Interval.of(top1), sign=False)] if top1 or not arm.diverged else []
    return ', '.join([*mean, *([f'diverged: {len(arm.diverged)}'] if arm.diverged else [])])


def among_text(*arms: ArmResult) -> str:
    """Returns what a comparison leaves out, to add to its sentence; nothing if no run diverged."""
    return ', among the seeds that did not diverge' if any(arm.diverged for arm in arms) else ''


def verdict(trial: TrialResult) -> list[str]:
    """Returns sentences: each arm against the reference, what failed, what a search did."""
    sentences = [_against(trial, name) for name in trial.arms if name != trial.settings.reference]
    for arm in trial.arms.values():
        sentences += _troubles(trial, arm)
    if trial.search is not None:
        sentences.append(trial.search.sentence())
    return sentences


def _against(trial: TrialResult, name: str) -> str:
    reference = trial.reference.name
    among = among_text(trial.arms[name], trial.reference)
    difference = trial.difference(name)
    if not difference.count:
        return f'{name} and {reference}: no seed with which both are finished.'
    if difference.count == 1:
        return (
            f'{name} and {reference}{among}: one seed, {difference.mean:+.2f} points. One seed cannot say how much of '
            f'that is chance.'
        )
    seeds = f'{difference.count} seeds'
    numbers = f'{difference.mean:+.2f} points, 95 % interval {difference.lower:+.2f} to {difference.upper:+.2f}'
    if not difference.excludes_zero:
        return f'{name} and {reference}{among}: no difference that {seeds} can show ({numbers}).'
    better = 'better' if difference.mean > 0 else 'worse'
    return f'{name} is {better} than {reference} by {abs(difference.mean):.2f} points{among} ({numbers}, {seeds}).'


def _troubles(trial: TrialResult, arm: ArmResult) -> list[str]:
    count = len(trial.settings.seeds)
    found = [
        f'The search in searches/{folder} diverged, and what needs its scales does not train: {failure} Repeat the '
        f'trial in another --output with a lower learning rate of the searches, --search-kwargs lr=..., or with their '
        f'gradients clipped, clip_grad=5.'
        for folder, failure in arm.search_failures.items()
    ]
    if arm.hopeless:
        return found or [f'{arm.name} diverged at every learning rate that was tried.']
    if guess := _guess_text(trial, arm):
        found.append(guess)
    elif arm.choice.at_edge:
        found.append(
            f'The learning rate of {arm.name}, {arm.choice.best:g}, is at the edge of what was tried: a better one may '
            f'lie beyond.'
        )
    if arm.diverged:
        others = '; its mean is that of the others' if arm.top1 else ''
        found.append(f'{len(arm.diverged)} of {count} runs of {arm.name} diverged{others}.')
    missing = count - len(arm.top1) - len(arm.diverged)
    if missing:
        found.append(f'{missing} of {count} runs of {arm.name} are not finished.')
    return found


def _guess_text(trial: TrialResult, arm: ArmResult) -> str:
    """Says if the best of all learning rates may be a guess; nothing if the number of classes is unknown."""
    classes, images, best = trial.settings.classes, trial.settings.held_out, arm.choice.best
    top1 = math.nan if best is None else arm.tuning.get(best, math.nan)
    if not classes or not images or not is_guessing(top1, classes, images):
        return ''
    return (
        f'No learning rate that was tried is known to train {arm.name}: {top1:.2f} % of {classes} classes at {best:g}, '
        f'the best, does not exceed what guessing may reach on {images} held-out images.'
    )


def arms_table(trial: TrialResult) -> str:
    """Returns the table of a trial: accuracies, differences, costs."""
    reference = trial.settings.reference
    head = ['arm', 'lr', 'seeds', 'top-1, 95 %', f'difference to {reference}, 95 %']
    head += ['s per epoch', 'step', 'activations', 'parameters']
    return markdown_table(head, [_row(trial, arm) for arm in trial.arms.values()], align=True)


def _row(trial: TrialResult, arm: ArmResult) -> list[str]:
    difference = '' if arm.name == trial.settings.reference else interval_text(trial.difference(arm.name))
    network, base = arm.network, trial.reference.network
    step = network['step_seconds'] / base['step_seconds'] if network and base else None
    return [
        f'{arm.name}: {arm.title}',
        '-' if arm.choice.best is None else f'{arm.choice.best:g}',
        str(len(arm.top1)),
        accuracy_text(trial, arm),
        difference,
        '-' if math.isnan(arm.epoch_seconds) else f'{arm.epoch_seconds:.1f}',
        '-' if step is None else f'{step:.2f} x',
        f'{network["activations"] / 1e6:.2f} MB' if network else '-',
        f'{network["parameters"] / 1e6:.2f} M' if network else '-',
    ]


def time_table(trial: TrialResult) -> str:
    """Returns accuracies at the wall time of the fastest arm's runs; nothing if all arms take about as long."""
    epochs = trial.shared.epochs + trial.shared.cooldown_epochs
    times = {arm.name: arm.seconds(epochs) for arm in trial.arms.values() if arm.top1}
    times = {name: seconds for name, seconds in times.items() if not math.isnan(seconds)}
    if not times or max(times.values()) < _FASTER * min(times.values()):
        return ''
    seconds = min(times.values())
    fastest = [name for name, each in times.items() if each == seconds]
    rows = []
    for name, whole in times.items():
        arm = trial.arms[name]
        reached = arm.top1_within(seconds)
        values = [top1 for _, top1 in reached.values()]
        done = max((epoch for epoch, _ in reached.values()), default=0)
        accuracy = _with_diverged(values, arm)
        rows.append([name, f'{whole:.0f} s', f'{done} of {epochs}', accuracy])
    title = f'epochs in {seconds:.0f} s ({", ".join(fastest)})'
    return markdown_table(['arm', 'wall time of a run', title, 'top-1 by then, 95 %'], rows, align=True)
