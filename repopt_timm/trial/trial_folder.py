"""The folder of a trial, which takes runs of one protocol only; docs/trial.md shows what is in it.

Each run is an ordinary one of the training command, with `config.yaml` and `train.log` beside its files. All that a
trial knows of its progress is read from there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ..files import write_text
from ..names import ModelName
from ..tables import read_mapping, read_table
from ..train.arguments import SEARCH_DECAY
from ..train.parsing import parse_arguments, write_config
from ..train.run_folder import DIVERGED_FILE, SCALES_FILE, SUMMARY_FILE, TIMES_FILE
from .arms import ARMS, GIVEN, SEARCHED, arm_of, in_order
from .statistics import Choice, choose_rate

_SETTINGS_FILE, _SHARED_FILE = 'trial.yaml', 'shared.yaml'

# Without these arguments the file of the shared ones is damaged.
_NEEDED = ('model_kwargs', 'epochs', 'warmup_epochs', 'batch_size', 'train_images', 'data_dir', 'dataset')

# Where and how fast a run is computed, and what it prints and keeps. Epochs between validations are not among them: a
# comparison at equal wall time takes the last accuracy before it, of all seeds after the same epoch.
_FREE = {
    *('workers', 'device', 'pin_mem', 'validation_batch_size', 'cache_images', 'dataset_download', 'checkpoint_hist'),
    *('log_interval', 'log_tensorboard', 'log_wandb', 'model'),
}


@dataclass(frozen=True, eq=False)
class Run:
    """A run of the training command, of the `tuning`, `searches` or `runs`; it waits for `search`, if any."""

    folder: Path
    kind: str
    # The arguments in which this run differs from others.
    arguments: Mapping[str, Any]
    epochs: int
    search: 'Run | None' = None

    def history(self) -> list[dict[str, float]]:
        """Returns a row for each finished epoch: the columns of `summary.csv`, and `train_seconds`."""
        path = self.folder / SUMMARY_FILE
        rows = read_table(path, ('epoch', 'train_loss'))
        is_whole = len(rows) < self.epochs or 'eval_top1' in rows[-1]
        if not is_whole or [row['epoch'] for row in rows] != list(range(1, len(rows) + 1)):
            raise ValueError(f"'{path}' is damaged: it lacks an epoch, or the accuracy after the last one.")
        seconds = {row['epoch']: row for row in read_table(self.folder / TIMES_FILE, ('epoch', 'train_seconds'))}
        return [{**row, **seconds.get(row['epoch'], {})} for row in rows]

    @property
    def failure(self) -> str:
        """The error that ended this run or its search; '' if none."""
        if self.search and self.search.failure:
            return f'Its search diverged: {self.search.failure}'
        path = self.folder / DIVERGED_FILE
        return path.read_text(encoding='utf-8').strip() if path.exists() else ''

    @property
    def top1(self) -> float:
        """Top-1 accuracy after the last epoch, in percent; NaN if the run diverged or is not finished."""
        rows = self.history()
        result = self.folder / (SCALES_FILE if self.kind == 'searches' else SUMMARY_FILE)
        is_finished = len(rows) >= self.epochs and not self.failure and result.exists()
        return rows[-1]['eval_top1'] if is_finished else math.nan

    @property
    def is_open(self) -> bool:
        return not self.failure and math.isnan(self.top1)


@dataclass(frozen=True)
class Trial:
    """A trial: the arguments that its runs share, and what it is of; `scales` and `fingerprints` are by arm."""

    folder: Path
    shared: dict[str, Any]
    model: str
    arms: list[str]
    seeds: list[int]
    lrs: list[float]
    lr: float | None
    holdout: float
    tuning_epochs: int
    tuning_seed: int
    scales: dict[str, str]
    search: int | None
    reference: str
    fingerprints: dict[str, str] = field(default_factory=dict)
    # None if unknown; the images are those that learning rates are compared on.
    classes: int | None = None
    held_out: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The content of `trial.yaml`."""
        return {name: value for name, value in vars(self).items() if name not in ('folder', 'shared')}

    @property
    def num_classes(self) -> int:
        return self.shared['num_classes'] or self.classes or 1000

    def training(self, arm: str, seed: int, lr: float) -> Run:
        """Returns the run of an arm with a seed."""
        return self._run(arm, 'runs', f'seed-{seed}', self.shared['epochs'], {'seed': seed}, {'lr': lr})

    def tuning(self, arm: str, lr: float) -> Run:
        """Returns the run that shows what a learning rate is worth."""
        epochs = self.tuning_epochs
        alike = {'seed': self.tuning_seed, 'holdout': self.holdout}
        return self._run(arm, 'tuning', f'lr-{lr:g}', epochs, alike, {'lr': lr, 'val_interval': epochs})

    def searches(self, arm: str) -> list[Run]:
        """Returns the searches that the runs of an arm wait for, the one before learning rates are chosen first."""
        runs = [self.tuning(arm, 0.1)] if self.lr is None else []
        runs += [self.training(arm, seed, 0.1) for seed in self.seeds]
        return [run.search for run in runs if run.search]

    def arguments_of(self, arm: str) -> dict[str, Any]:
        """Returns the arguments that make an arm; `model` and `model_kwargs` make its network."""
        each = arm_of(arm)
        arguments = {'model': ModelName.parse(self.model).of_kind(each.kind), **each.arguments}
        arguments['model_kwargs'] = {**self.shared['model_kwargs'], **each.arguments.get('model_kwargs', {})}
        if arguments.get('scales') == GIVEN:
            arguments['scales'] = self.scales[arm]
        return arguments

    def _run(self, arm: str, kind: str, name: str, epochs: int, alike: dict[str, Any], own: dict[str, Any]) -> Run:
        """Returns a run of an arm; a search before it shares the arguments `alike`."""
        arguments, search = self.arguments_of(arm), None
        if arguments.get('scales') == SEARCHED:
            folder = self.folder / 'searches' / (name if kind == 'runs' else kind)
            arguments['scales'] = str(folder / SCALES_FILE)
            what = {'model': self.model + '_hs', 'opt': 'sgd', 'weight_decay': SEARCH_DECAY, **alike}
            search = self._scheduled(folder, 'searches', self.search or 0, what)
        return self._scheduled(self.folder / kind / arm / name, kind, epochs, {**arguments, **alike, **own}, search)

    def _scheduled(
        self, folder: Path, kind: str, epochs: int, arguments: dict[str, Any], search: Run | None = None
    ) -> Run:
        # A shorter schedule has the same shape.
        warmup = self.shared['warmup_epochs'] and self.shared['warmup_epochs'] * epochs / self.shared['epochs']
        return Run(folder, kind, {'epochs': epochs, 'warmup_epochs': warmup, **arguments}, epochs, search)

    def choice(self, arm: str) -> Choice:
        """Returns what is known of an arm's learning rate."""
        rate = arm_of(arm).rate
        if self.lr is not None:
            return Choice((), rate * self.lr)
        grid = [lr if rate == 1 else float(f'{rate * lr:.3g}') for lr in self.lrs]
        scores: dict[float, float] = {}
        while (choice := choose_rate(grid, scores)).missing:
            runs = {lr: self.tuning(arm, lr) for lr in choice.missing}
            if missing := tuple(lr for lr, run in runs.items() if run.is_open):
                return Choice(missing)
            scores |= {lr: run.top1 for lr, run in runs.items()}
        return choice

    def open_runs(self) -> list[Run]:
        """Lists the runs that are neither finished nor diverged and that can start, the most urgent first.

        Learning rates come first, as the other runs wait for them, then seed after seed.
        """
        choices = {arm: self.choice(arm) for arm in self.arms}
        wanted = [self.tuning(arm, lr) for arm, choice in choices.items() for lr in choice.missing]
        for seed in self.seeds:
            wanted += [self.training(arm, seed, choice.best) for arm, choice in choices.items() if choice.best]
        ready = [run.search if run.search and run.search.is_open else run for run in wanted if run.is_open]
        return list({run.folder: run for run in ready}.values())

    def joined(self, reference: str | None = None) -> 'Trial':
        """Returns the trial with the arms and seeds of all calls in its folder, whose runs must be of one protocol.

        The reference arm of the folder stays unless this call names one.
        """
        if not (self.folder / _SETTINGS_FILE).exists():
            return self
        old = open_trial(self.folder)
        saved, values = old._fixed(old.arms), self._fixed(old.arms)
        if changed := [name for name in values if name in saved and saved[name] != values[name]]:
            differences = ', '.join(f'{name} {saved[name]!r} -> {values[name]!r}' for name in changed)
            raise ValueError(
                f"'{self.folder}' is of a trial with other arguments: {differences}. Choose another --output."
            )
        return replace(
            self,
            arms=in_order([*old.arms, *self.arms]),
            seeds=sorted({*old.seeds, *self.seeds}),
            scales={**old.scales, **self.scales},
            search=old.search if 'search' in old.arms else self.search,
            reference=reference or old.reference,
            fingerprints={**old.fingerprints, **self.fingerprints},
            classes=self.classes or old.classes,
            held_out=self.held_out or old.held_out,
        )

    def _fixed(self, arms: Sequence[str]) -> dict[str, Any]:
        """Returns what stays as it is from call to call, with the scales of these arms alone."""
        each = self.settings
        names = ['model', 'lrs', 'lr', 'holdout', 'tuning_epochs', 'tuning_seed']
        # What only some calls know.
        names += ['search'] * ('search' in self.arms)
        names += [name for name in ('classes', 'held_out') if each[name] is not None]
        found = protocol(self.shared) | {name: each[name] for name in names}
        for what in ('scales', 'fingerprints'):
            found |= {f'{what} of {arm}': each[what][arm] for arm in arms if arm in each[what]}
        return found

    def write(self) -> None:
        """Writes `trial.yaml` and `shared.yaml`."""
        write_text(self.folder / _SHARED_FILE, yaml.safe_dump(self.shared, sort_keys=False))
        write_text(self.folder / _SETTINGS_FILE, yaml.safe_dump(self.settings, sort_keys=False))


def open_trial(folder: Path) -> Trial:
    """Opens the folder of a trial; an error names the file that is missing or damaged."""
    path = folder / _SETTINGS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"'{folder}' is not the folder of a trial: it has no {_SETTINGS_FILE}.")
    shared = read_mapping(folder / _SHARED_FILE, _NEEDED)
    saved = read_mapping(path, [each.name for each in fields(Trial) if each.name not in ('folder', 'shared')])
    try:
        for name, kind in {'arms': str, 'seeds': int, 'lrs': float}.items():
            saved[name] = [kind(value) for value in saved[name]]
        for name in ('lr', 'holdout', 'tuning_epochs', 'tuning_seed', 'search', 'classes', 'held_out'):
            if not isinstance(saved[name], int | float | None):
                raise ValueError(f'{name} is {saved[name]!r}, expected a number')
        if unknown := {*saved['arms'], saved['reference']} - {*ARMS, *saved['scales']}:
            raise ValueError(f'it names unknown arms: {", ".join(map(str, unknown))}')
        return Trial(folder, shared, **saved)
    except (TypeError, ValueError) as error:
        raise ValueError(f"'{path}' is damaged: {error}.") from None


def protocol(shared: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the shared arguments that make accuracies, or their times, comparable.

    An argument that is not there, as it is new, has its default.
    """
    default: dict[str, Any] = yaml.safe_load(write_config(parse_arguments([])))
    return {name: shared.get(name, value) for name, value in default.items() if name not in _FREE}
