"""What the folder of a trial says of it, in `trial.yaml` and `shared.yaml`, and what may differ from call to call."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from ..files import write_text
from ..train.parsing import parse_arguments, write_config
from ..train.run_folder import DIVERGED_FILE, SUMMARY_FILE, is_busy
from .arms import in_order
from .trial_settings import TrialSettings

__all__ = [
    'SETTINGS_FILE',
    'SHARED_FILE',
    'has_trained',
    'joined_settings',
    'protocol',
    'read_saved_settings',
    'read_shared',
    'write_settings',
]

SETTINGS_FILE = 'trial.yaml'
SHARED_FILE = 'shared.yaml'

# Where and how fast a run is computed, and what it prints and keeps. Epochs between validations are not among them: a
# comparison at equal wall time takes the last accuracy before it, of all seeds after the same epoch.
_FREE = {
    *('workers', 'device', 'pin_mem', 'validation_batch_size', 'cache_images', 'dataset_download', 'checkpoint_hist'),
    *('log_interval', 'log_tensorboard', 'log_wandb'),
}


def has_trained(folder: Path) -> bool:
    """Returns whether a run of a trial trains, or has trained an epoch; before that its arguments can still change."""
    runs = [run for pattern in ('tuning/*/*', 'searches/*', 'runs/*/*') for run in folder.glob(pattern)]
    return any((run / SUMMARY_FILE).exists() or (run / DIVERGED_FILE).exists() or is_busy(run) for run in runs)


def joined_settings(
    folder: Path, settings: TrialSettings, shared: argparse.Namespace, reference: str | None = None
) -> TrialSettings:
    """Returns the settings of a trial with the arms and seeds of all its calls, which a report is of.

    Args:
        folder: Folder of the trial, which need not exist.
        settings: What this call is of.
        shared: What its runs share.
        reference: The reference arm, if this call names one; else that of the folder stays.

    Raises:
        ValueError: If the folder holds a trial whose runs were trained otherwise.
    """
    if not (folder / SETTINGS_FILE).exists() or not has_trained(folder):
        return settings
    old = read_saved_settings(folder)
    _check_same(folder, protocol(read_shared(folder)), protocol(shared))
    _check_same(folder, _fixed(old, old.arms), _fixed(settings, old.arms))
    _check_scales(folder, old, settings)
    searched = old if 'search' in old.arms else settings
    return replace(
        settings,
        arms=tuple(in_order([*old.arms, *settings.arms])),
        seeds=tuple(sorted({*old.seeds, *settings.seeds})),
        scales={**old.scales, **settings.scales},
        search=searched.search,
        search_kwargs=searched.search_kwargs,
        reference=reference or old.reference,
        fingerprints={**old.fingerprints, **settings.fingerprints},
        classes=settings.classes or old.classes,
        held_out=settings.held_out or old.held_out,
    )


def write_settings(folder: Path, settings: TrialSettings, shared: argparse.Namespace) -> None:
    """Writes `trial.yaml`, with what `joined_settings` returned, and `shared.yaml`."""
    write_text(folder / SHARED_FILE, write_config(shared))
    write_text(folder / SETTINGS_FILE, yaml.safe_dump(asdict(settings), sort_keys=False))


def read_saved_settings(folder: Path) -> TrialSettings:
    """Reads `trial.yaml`."""
    saved: dict[str, Any] = yaml.safe_load((folder / SETTINGS_FILE).read_text(encoding='utf-8'))
    if not isinstance(saved['scales'], dict):
        # Folders of older trials: one source of scales, or none.
        saved['scales'] = {'scales': saved['scales']} if saved['scales'] else {}
    given: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in saved.items()}
    return TrialSettings(**given)


def read_shared(folder: Path) -> argparse.Namespace:
    """Reads `shared.yaml`."""
    return parse_arguments(['-c', str(folder / SHARED_FILE)])


def protocol(shared: argparse.Namespace) -> dict[str, Any]:
    """Returns the shared arguments that make accuracies, or their times, comparable."""
    values: dict[str, Any] = yaml.safe_load(write_config(shared))
    return {name: value for name, value in values.items() if name not in _FREE}


def _fixed(settings: TrialSettings, arms: Sequence[str]) -> dict[str, Any]:
    """Returns what stays as it is from call to call; of scales, those of the arms that have trained."""
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(asdict(settings)))
    scales = values.pop('scales')
    unknown = [name for name in ('classes', 'held_out') if values[name] is None]
    for name in (
        *unknown,
        'fingerprints',
        'arms',
        'seeds',
        'reference',
        *(() if 'search' in settings.arms else ('search', 'search_kwargs')),
    ):
        del values[name]
    return values | {f'scales {arm}': source for arm, source in scales.items() if arm in arms}


def _check_scales(folder: Path, old: TrialSettings, new: TrialSettings) -> None:
    for arm, fingerprint in new.fingerprints.items():
        trained = old.fingerprints.get(arm, fingerprint)
        if arm in old.arms and trained != fingerprint:
            raise ValueError(
                f"--scales {arm}={new.scales[arm]} are the scales {fingerprint[:12]}, but '{folder}' has trained with "
                f'{trained[:12]} from there. Put these back, or give the new ones a NAME of their own.'
            )


def _check_same(folder: Path, saved: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    changed = [name for name in values if name in saved and saved[name] != values[name]]
    if changed:
        differences = ', '.join(f'{name} {saved[name]!r} -> {values[name]!r}' for name in changed)
        raise ValueError(
            f"'{folder}' is the folder of a trial with other arguments: {differences}. Continue it with its own, or "
            f'choose another --output.'
        )
