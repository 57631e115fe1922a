"""The folder of a trial, which takes runs of one protocol only.

    trial.yaml, shared.yaml                what the trial is of, and what its runs share
    tuning/<arm>/lr-<lr>/                  one run for each learning rate, on a part of the training images
    searches/tuning/, searches/seed-<n>/   hyper-searches
    runs/<arm>/seed-<n>/                   what the trial is for

Each run is an ordinary one of the training command, with `config.yaml` and `train.log` beside its files. All that a
trial knows of its progress is read from there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..files import write_text
from ..names import ModelName
from ..tables import read_mapping, read_table
from ..train.parsing import parse_arguments, write_config
from ..train.run_folder import DIVERGED_FILE, SCALES_FILE, SUMMARY_FILE, TIMES_FILE, is_busy
from .arms import GIVEN, SEARCHED, arm_of, in_order
from .trial_settings import TrialSettings
from .tuning import Choice, choose_rate

__all__ = ['Run', 'Trial', 'open_trial', 'protocol']

_SETTINGS_FILE, _SHARED_FILE = 'trial.yaml', 'shared.yaml'

# What a report shows of the arguments that all runs share.
_NEEDED = (
    *('model_kwargs', 'epochs', 'cooldown_epochs', 'warmup_epochs', 'batch_size', 'train_images', 'data_dir'),
    'dataset',
)

# Where and how fast a run is computed, and what it prints and keeps. Epochs between validations are not among them: a
# comparison at equal wall time takes the last accuracy before it, of all seeds after the same epoch.
_FREE = {
    *('workers', 'device', 'pin_mem', 'validation_batch_size', 'cache_images', 'dataset_download', 'checkpoint_hist'),
    *('log_interval', 'log_tensorboard', 'log_wandb', 'model'),
}


@dataclass(frozen=True, eq=False)
class Run:
    """A run of the training command.

    Attributes:
        folder: Its folder.
        kind: `tuning`, `searches` or `runs`.
        arguments: What it does not share with the other runs.
        epochs: Epochs that it has in the end.
        after: A search that it needs the result of.
    """

    folder: Path
    kind: str
    arguments: Mapping[str, Any]
    epochs: int
    after: 'Run | None' = None

    def history(self) -> list[dict[str, float]]:
        """Returns a row for each finished epoch: the columns of `summary.csv`, and `train_seconds`.

        Raises:
            ValueError: If a file is cut off or edited; names it.
        """
        path = self.folder / SUMMARY_FILE
        rows = read_table(path, ('epoch', 'train_loss'))
        if [row['epoch'] for row in rows] != list(range(1, len(rows) + 1)):
            raise ValueError(f"'{path}' is damaged: its epochs are not 1, 2, 3 and so on.")
        if len(rows) >= self.epochs and 'eval_top1' not in rows[-1]:
            raise ValueError(f"'{path}' is damaged: its last epoch has no eval_top1.")
        # An epoch that was repeated after an interruption has a second line.
        seconds = {row['epoch']: row for row in read_table(self.folder / TIMES_FILE, ('epoch', 'train_seconds'))}
        return [{**row, **seconds.get(row['epoch'], {})} for row in rows]

    @property
    def failure(self) -> str:
        """What it diverged with; nothing if it did not."""
        path = self.folder / DIVERGED_FILE
        return (path.read_text(encoding='utf-8').strip() or 'it diverged') if path.exists() else ''

    @property
    def top1(self) -> float | None:
        """Top-1 accuracy after the last epoch, in percent; None if the run diverged or is not finished."""
        rows = self.history()
        result = self.folder / (SCALES_FILE if self.kind == 'searches' else SUMMARY_FILE)
        return None if len(rows) < self.epochs or self.failure or not result.exists() else rows[-1]['eval_top1']

    @property
    def is_ended(self) -> bool:
        return bool(self.failure) or self.top1 is not None


@dataclass(frozen=True)
class Trial:
    """A trial and its runs.

    Attributes:
        folder: Its folder.
        settings: What it is of.
        shared: What its runs share, as arguments of a run.
    """

    folder: Path
    settings: TrialSettings
    shared: dict[str, Any]

    def training(self, arm: str, seed: int, lr: float) -> Run:
        """Returns the run of an arm with a seed."""
        return self._run('runs', f'{arm}/seed-{seed}', arm, self.shared['epochs'], {'seed': seed}, {'lr': lr})

    def tuning(self, arm: str, lr: float) -> Run:
        """Returns the run that shows what a learning rate is worth."""
        epochs, alike = (
            self.settings.tuning_epochs,
            {'seed': self.settings.tuning_seed, 'holdout': self.settings.holdout},
        )
        return self._run('tuning', f'{arm}/lr-{lr:g}', arm, epochs, alike, {'lr': lr, 'val_interval': epochs})

    def searches(self, arm: str) -> list[Run]:
        """Returns the searches that the runs of an arm wait for, those of the seeds first."""
        runs = [self.training(arm, seed, 0.1) for seed in self.settings.seeds]
        runs += [self.tuning(arm, 0.1)] * (self.settings.lr is None)
        return [run.after for run in runs if run.after is not None]

    def arguments_of(self, arm: str) -> dict[str, Any]:
        """Returns the arguments that make an arm; those of its network are `model` and `model_kwargs`."""
        each = arm_of(arm)
        arguments = {'model': ModelName.parse(self.settings.model).of_kind(each.kind), **each.arguments}
        arguments['model_kwargs'] = {**self.shared['model_kwargs'], **each.arguments.get('model_kwargs', {})}
        if arguments.get('scales') == GIVEN:
            arguments['scales'] = self.settings.scales[arm]
        return arguments

    def _run(
        self, kind: str, name: str, arm: str, epochs: int, alike: Mapping[str, Any], own: Mapping[str, Any]
    ) -> Run:
        """Returns a run of an arm; a search before it shares the arguments `alike`."""
        arguments, after = self.arguments_of(arm), None
        if arguments.get('scales') == SEARCHED:
            # Strongly decayed identities leave targets that learn slowly.
            what = {'model': self.settings.model + '_hs', 'opt': 'sgd', 'weight_decay': 4e-5, **alike}
            folder = self.folder / 'searches' / ('tuning' if kind == 'tuning' else Path(name).name)
            after = self._of_length(folder, 'searches', self.settings.search or 0, what)
            arguments['scales'] = str(folder / SCALES_FILE)
        return self._of_length(self.folder / kind / name, kind, epochs, {**arguments, **alike, **own}, after)

    def _of_length(
        self, folder: Path, kind: str, epochs: int, arguments: dict[str, Any], after: Run | None = None
    ) -> Run:
        warmup = self.shared['warmup_epochs']
        if warmup:
            # A shorter schedule has the same shape.
            share = round(warmup * epochs / self.shared['epochs'])
            warmup = max(1, share) if epochs > 1 else share
        arguments = {'epochs': epochs, 'warmup_epochs': warmup, **arguments}
        return Run(folder, kind, arguments, epochs + self.shared['cooldown_epochs'], after)

    def choice(self, arm: str) -> Choice:
        """Returns what is known of an arm's learning rate."""
        rate = arm_of(arm).rate
        if self.settings.lr is not None:
            return Choice((), rate * self.settings.lr)
        grid = [lr if rate == 1 else float(f'{rate * lr:.3g}') for lr in self.settings.lrs]
        scores: dict[float, float] = {}
        while (choice := choose_rate(grid, scores)).missing:
            runs = {lr: self.tuning(arm, lr) for lr in choice.missing}
            ended = {lr: run for lr, run in runs.items() if run.is_ended}
            if len(ended) < len(runs):
                return Choice(tuple(lr for lr in runs if lr not in ended))
            scores |= {lr: float('nan') if run.top1 is None else run.top1 for lr, run in ended.items()}
        return choice

    def open_runs(self) -> list[Run]:
        """Lists the runs that are neither finished nor diverged and that can start, the most urgent first.

        Learning rates come first, as the other runs wait for them, then seed after seed, so that all arms of a seed are
        there early.
        """
        settings, choices = self.settings, {arm: self.choice(arm) for arm in self.settings.arms}
        wanted = [self.tuning(arm, lr) for arm, choice in choices.items() for lr in choice.missing]
        for seed in settings.seeds:
            wanted += [self.training(arm, seed, choice.best) for arm, choice in choices.items() if choice.best]
        found: dict[Path, Run] = {}
        for run in wanted:
            if not run.is_ended:
                first = run.after if run.after is not None and run.after.top1 is None else run
                if not first.failure:
                    found.setdefault(first.folder, first)
        return list(found.values())

    def has_trained(self) -> bool:
        """Returns whether a run trains, or has trained an epoch; before that the arguments can still change."""
        runs = [run for pattern in ('tuning/*/*', 'searches/*', 'runs/*/*') for run in self.folder.glob(pattern)]
        return any((run / SUMMARY_FILE).exists() or (run / DIVERGED_FILE).exists() or is_busy(run) for run in runs)

    def joined(self, reference: str | None = None) -> 'Trial':
        """Returns the trial with the arms and seeds of all calls in its folder, which a report is of.

        Args:
            reference: The reference arm, if this call names one; else that of the folder stays.

        Raises:
            ValueError: If the runs in the folder were trained otherwise.
        """
        if not (self.folder / _SETTINGS_FILE).exists() or not self.has_trained():
            return self
        before, new = open_trial(self.folder), self.settings
        old = before.settings
        saved, values = before._fixed(old.arms), self._fixed(old.arms)
        if changed := [name for name in values if name in saved and saved[name] != values[name]]:
            differences = ', '.join(f'{name} {saved[name]!r} -> {values[name]!r}' for name in changed)
            raise ValueError(
                f"'{self.folder}' is the folder of a trial with other arguments: {differences}. Continue it with its "
                f'own, or choose another --output.'
            )
        settings = replace(
            new,
            arms=in_order([*old.arms, *new.arms]),
            seeds=sorted({*old.seeds, *new.seeds}),
            scales={**old.scales, **new.scales},
            search=old.search if 'search' in old.arms else new.search,
            reference=reference or old.reference,
            fingerprints={**old.fingerprints, **new.fingerprints},
            classes=new.classes or old.classes,
            held_out=new.held_out or old.held_out,
        )
        return replace(self, settings=settings)

    def _fixed(self, arms: Sequence[str]) -> dict[str, Any]:
        """Returns what stays as it is from call to call; of scales, those of some arms."""
        each = asdict(self.settings)
        names = ['model', 'lrs', 'lr', 'holdout', 'tuning_epochs', 'tuning_seed']
        names += ['search'] * ('search' in self.settings.arms)
        # Unknown in folders of older trials.
        names += [name for name in ('classes', 'held_out') if each[name] is not None]
        found = protocol(self.shared) | {name: each[name] for name in names}
        for what in ('scales', 'fingerprints'):
            found |= {f'{what} of {arm}': each[what][arm] for arm in arms if arm in each[what]}
        return found

    def write(self) -> None:
        """Writes `trial.yaml` and `shared.yaml`."""
        write_text(self.folder / _SHARED_FILE, yaml.safe_dump(self.shared, sort_keys=False))
        write_text(self.folder / _SETTINGS_FILE, yaml.safe_dump(asdict(self.settings), sort_keys=False))


def open_trial(folder: Path) -> Trial:
    """Opens the folder of a trial.

    Raises:
        FileNotFoundError: If it is not one.
        ValueError: If its files are damaged; names the file.
    """
    if not (folder / _SETTINGS_FILE).is_file():
        found = sorted(path.parent for path in folder.glob(f'*/{_SETTINGS_FILE}'))
        names = ', '.join(path.name for path in found)
        within = f" It holds {names}, which are: name them, such as '{found[0]}'." if found else ''
        raise FileNotFoundError(f"'{folder}' is not the folder of a trial: it has no {_SETTINGS_FILE}.{within}")
    return Trial(folder, TrialSettings.read(folder / _SETTINGS_FILE), read_mapping(folder / _SHARED_FILE, _NEEDED))


def protocol(shared: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the shared arguments that make accuracies, or their times, comparable.

    An argument that is not there, as in the folder of an older version, has its default.
    """
    default: dict[str, Any] = yaml.safe_load(write_config(parse_arguments([])))
    return {name: shared.get(name, value) for name, value in default.items() if name not in _FREE}
