"""`repopt-timm trial`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..datasets import count_classes
from ..train.loaders import make_datasets
from ..train.run import prepare_device
from ..train.validation import check_arguments
from .execution import run_all, threads_of
from .given_scales import read_fingerprints
from .networks import measure_networks
from .results import read_results
from .trial_folder import joined_settings, write_settings
from .trial_plan import open_runs
from .trial_report import report_trial, report_trials
from .trial_runs import LOG_FILE, TrialRuns
from .trial_settings import TrialSettings, add_trial_arguments, read_report_settings, read_settings

__all__ = ['add_commands', 'run_trial']


def add_commands(commands: Any) -> None:
    """Adds the command to what `ArgumentParser.add_subparsers` returned."""
    parser = commands.add_parser(
        'trial',
        description='Train a network in several ways, with paired seeds, and report whether they differ.',
        argument_default=argparse.SUPPRESS,
        # --seed is not the beginning of --seeds.
        allow_abbrev=False,
    )
    add_trial_arguments(parser)
    parser.set_defaults(run=run_trial)


def run_trial(namespace: argparse.Namespace) -> None:
    """Runs a trial.

    Args:
        namespace: What the parser gave: texts, and only what is on the command line.

    Raises:
        ValueError: If arguments do not go together, or a run ends with an error.
        FileNotFoundError: If a file that they name does not exist.
        KeyboardInterrupt: If Ctrl-C or SIGTERM ended it.
    """
    logging.basicConfig(level=logging.WARNING, format='%(message)s', force=True)
    logging.getLogger('repopt_timm').setLevel(logging.INFO)
    del namespace.run
    if wanted := read_report_settings(namespace):
        _report(*wanted)
        return
    settings, shared, local = read_settings(namespace)
    settings, device = _check(settings, shared)
    runs = TrialRuns(Path(local.output), settings, shared)
    settings = replace(settings, fingerprints=read_fingerprints(runs, settings.classes))
    joined = joined_settings(runs.folder, settings, shared, local.reference)
    threads = threads_of(local.jobs, local.threads)
    measure_networks(runs, settings.classes, device, threads)
    # Only now: a network that cannot be made leaves the folder to the command that is right.
    write_settings(runs.folder, joined, shared)
    try:
        failed = run_all(partial(open_runs, runs), shared, local.jobs, threads)
    except KeyboardInterrupt:
        print('Stopped. The same command continues the trial.', file=sys.stderr)
        raise
    print(report_trial(read_results(runs.folder)))
    print(f'Report, picture, JSON and the CSV of all epochs are in {runs.folder}')
    if failed:
        logs = ', '.join(f"'{run.folder / LOG_FILE}'" for run in failed)
        raise ValueError(f'{len(failed)} runs ended with an error: see {logs}. The same command tries them again.')


def _report(folders: Sequence[str], output: str | None, reference: str | None) -> None:
    trials = [read_results(Path(folder), reference) for folder in folders]
    print(report_trial(trials[0]) if output is None else report_trials(trials, Path(output)))


def _check(settings: TrialSettings, shared: argparse.Namespace) -> tuple[TrialSettings, torch.device]:
    """Finds what is wrong with the arguments before anything trains; returns what the data add, and the device."""
    holdout = settings.holdout if settings.lr is None else 0.0
    checked = argparse.Namespace(**{**vars(shared), 'holdout': holdout})
    prepare_device(checked)
    check_arguments(checked)
    train, validation = make_datasets(checked)
    classes = count_classes(train) or shared.num_classes
    held_out = len(validation) if holdout else None
    return replace(settings, classes=classes, held_out=held_out), torch.device(checked.device)
