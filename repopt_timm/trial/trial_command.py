"""`repopt-timm trial`."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

try:
    import pandas  # noqa: F401
except ImportError:
    raise ImportError("A trial needs pandas: pip install 'repopt-timm[trial]'.") from None
import torch

from ..datasets import count_classes
from ..sources import load_scales
from ..train.loaders import make_datasets
from ..train.run import prepare_device
from ..train.validation import check_arguments
from .arms import target_name
from .execution import LOG_FILE, run_all
from .networks import make_network, measure_networks
from .report import report_trial, report_trials
from .results import TrialResult
from .trial_folder import Trial
from .trial_settings import read_arguments, read_settings, read_shared

__all__ = ['main', 'read_fingerprints']


def main(argv: Sequence[str]) -> None:
    """Runs a trial, or makes reports of trials.

    Args:
        argv: The words after `repopt-timm trial`.

    Raises:
        ValueError: If arguments do not go together, a file of the trial is damaged, or a run ends with an error.
        FileNotFoundError: If a file that they name does not exist.
        KeyboardInterrupt: If Ctrl-C or SIGTERM ended it.
    """
    logging.basicConfig(level=logging.WARNING, format='%(message)s', force=True)
    logging.getLogger('repopt_timm').setLevel(logging.INFO)
    args, words = read_arguments(argv)
    if args.report:
        results = [TrialResult(Path(folder), args.reference) for folder in args.report]
        print(report_trials(results, Path(args.output)) if args.output else report_trial(results[0]))
        return
    model = target_name(args.model)
    shared = read_shared(model, args.config, args.data, words)
    folder = Path(args.output or f'output/{model}-trial')
    trial, device = _check(Trial(folder, read_settings(args, model, shared['epochs']), shared))
    trial = replace(trial, settings=replace(trial.settings, fingerprints=read_fingerprints(trial)))
    joined = trial.joined(args.reference)
    of_machine = int(os.environ.get('OMP_NUM_THREADS') or max(1, torch.get_num_threads() // args.jobs))
    threads = args.threads or of_machine
    torch.set_num_threads(threads)
    measure_networks(trial, trial.settings.classes, device)
    # Only now: a network that cannot be made leaves the folder to the command that is right.
    joined.write()
    try:
        failed = run_all(trial, args.jobs, threads)
    except KeyboardInterrupt:
        print('Stopped. The same command continues the trial.', file=sys.stderr)
        raise
    print(report_trial(TrialResult(trial.folder)))
    print(f'Report, picture, JSON and the CSV of all epochs are in {trial.folder}')
    if failed:
        logs = ', '.join(f"'{run.folder / LOG_FILE}'" for run in failed)
        raise ValueError(f'{len(failed)} runs ended with an error: see {logs}. The same command tries them again.')


def read_fingerprints(trial: Trial) -> dict[str, str]:
    """Reads the given scales that runs still train with; a trial whose runs are all finished can do without the files.

    Returns:
        Name of an arm to the fingerprint of its scales.

    Raises:
        OSError: If there are no such scales, or they cannot be downloaded.
        ValueError: If they are not scales, or those of another network.
    """
    needed = {run.arguments.get('scales') for run in trial.open_runs()}
    given = trial.settings.scales
    sources = {arm: given[arm] for arm in trial.settings.arms if arm in given and given[arm] in needed}
    network = make_network(trial, num_classes=trial.settings.classes) if sources else None
    return {arm: load_scales(source, network).fingerprint for arm, source in sources.items()}


def _check(trial: Trial) -> tuple[Trial, torch.device]:
    """Finds what is wrong with the arguments before anything trains; returns what the data add, and the device."""
    settings = trial.settings
    holdout = settings.holdout if settings.lr is None else 0.0
    checked = argparse.Namespace(**{**trial.shared, 'holdout': holdout, 'resume': None, 'override': False})
    prepare_device(checked)
    check_arguments(checked)
    train, validation = make_datasets(checked)
    classes = count_classes(train) or checked.num_classes
    settings = replace(settings, classes=classes, held_out=len(validation) if holdout else None)
    return replace(trial, settings=settings), torch.device(checked.device)
