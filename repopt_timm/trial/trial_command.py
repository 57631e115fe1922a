"""`repopt-timm trial`."""

import argparse
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ..train.loaders import make_datasets
from ..train.run import prepare_device
from ..train.validation import check_arguments
from .execution import run_all
from .trial_plan import open_runs
from .trial_runs import LOG_FILE, TrialRuns
from .trial_settings import SHARED_FILE, add_trial_arguments, read_settings, write_settings

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
    settings, shared, local = read_settings(namespace)
    _check(shared)
    folder = Path(local.output)
    write_settings(folder, settings, shared)
    runs = TrialRuns(folder, settings, shared)
    try:
        failed = run_all(partial(open_runs, runs), folder / SHARED_FILE, local.jobs, local.threads)
    except KeyboardInterrupt:
        print('Stopped. The same command continues the trial.', file=sys.stderr)
        raise
    if failed:
        logs = ', '.join(f"'{run.folder / LOG_FILE}'" for run in failed)
        raise ValueError(f'{len(failed)} runs ended with an error: see {logs}. The same command tries them again.')


def _check(shared: argparse.Namespace) -> None:
    """Finds what is wrong with the arguments before anything trains."""
    checked = argparse.Namespace(**vars(shared))
    prepare_device(checked)
    check_arguments(checked)
    make_datasets(checked)
