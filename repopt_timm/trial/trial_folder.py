"""What the folder of a trial says of it: `trial.yaml` and `shared.yaml`."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..files import write_text
from ..train.parsing import write_config
from ..train.schema import ARGUMENTS
from .arms import in_order
from .trial_settings import TrialSettings

__all__ = ['SETTINGS_FILE', 'SHARED_FILE', 'read_saved_settings', 'write_settings']

SETTINGS_FILE = 'trial.yaml'
SHARED_FILE = 'shared.yaml'


def write_settings(folder: Path, settings: TrialSettings, shared: argparse.Namespace) -> None:
    """Writes `trial.yaml` and `shared.yaml`, or checks that those which are there are of the same trial.

    Arms and seeds may be others than before: what is trained already stays.

    Raises:
        ValueError: If the folder holds a trial whose runs were trained otherwise.
    """
    new = _plain(asdict(settings))
    shared_text = write_config(shared)
    if (folder / SETTINGS_FILE).exists():
        old = read_saved_settings(folder)
        trained = {name: source for name, source in old['scales'].items() if name in old['arms']}
        same_arms = {name: new['scales'].get(name, source) for name, source in trained.items()}
        _check_same(folder, {**old, 'scales': trained}, {**new, 'scales': same_arms})
        new = _joined(old, new)
    if (folder / SHARED_FILE).exists():
        _check_same(
            folder, yaml.safe_load((folder / SHARED_FILE).read_text(encoding='utf-8')), yaml.safe_load(shared_text)
        )
    write_text(folder / SHARED_FILE, shared_text)
    write_text(folder / SETTINGS_FILE, yaml.safe_dump(new, sort_keys=False))


def read_saved_settings(folder: Path) -> dict[str, Any]:
    """Reads `trial.yaml`, whose lists are tuples in `TrialSettings`."""
    saved: dict[str, Any] = yaml.safe_load((folder / SETTINGS_FILE).read_text(encoding='utf-8'))
    if not isinstance(saved['scales'], dict):
        # Folders of older trials: one source of scales, or none.
        saved['scales'] = {'scales': saved['scales']} if saved['scales'] else {}
    return saved


def _joined(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a trial with the arms and seeds of all its calls, which a report is of."""
    joined = {name: old.get(name) if value is None else value for name, value in new.items()}
    joined['arms'] = in_order([*old['arms'], *new['arms']])
    joined['scales'] = {**old['scales'], **new['scales']}
    joined['seeds'] = sorted({*old['seeds'], *new['seeds']})
    return joined


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _check_same(folder: Path, saved: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    free = {'arms', 'seeds', 'reference', *(name for name, each in ARGUMENTS.items() if each.free)} - {
        'epochs',
        'scales',
    }
    if 'search' not in saved.get('arms', ()):
        free |= {'search', 'search_kwargs'}
    changed = [name for name in values if name not in free and saved.get(name) != values[name]]
    if changed:
        differences = ', '.join(f'{name} {saved.get(name)!r} -> {values[name]!r}' for name in changed)
        raise ValueError(
            f"'{folder}' is the folder of a trial with other arguments: {differences}. Continue it with its own, or "
            f'choose another --output.'
        )
