"""`repopt-timm trial`: its runs side by side, each a process of the training command, and their report."""

import argparse
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

try:
    import pandas  # noqa: F401
except ImportError:
    raise ImportError("A trial needs pandas: pip install 'repopt-timm[trial]'.") from None
import torch
import yaml

from ..datasets import count_classes
from ..files import write_text
from ..sources import load_scales
from ..train.interruption import InterruptedRunError, postponed_signals, raise_if_interrupted
from ..train.loaders import make_datasets
from ..train.run import prepare_device
from ..train.run_folder import is_busy
from ..train.validation import check_arguments
from .arms import target_name
from .networks import make_network, measure_networks
from .report import report_trial, report_trials
from .results import TrialResult
from .trial_folder import Run, Trial
from .trial_settings import read_arguments, read_settings, read_shared

LOG_FILE = 'train.log'

_logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Runs a trial, or makes reports of trials, from the words after `repopt-timm trial`."""
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
    threads = args.threads or int(os.environ.get('OMP_NUM_THREADS') or max(1, torch.get_num_threads() // args.jobs))
    torch.set_num_threads(threads)
    measure_networks(trial, trial.settings.classes, device)
    # Only now: a network that cannot be made leaves the folder to the command that is right.
    joined.write()
    try:
        failed = run_all(trial, args.jobs, threads)
    except InterruptedRunError:
        print('Stopped. The same command continues the trial.', file=sys.stderr)
        raise KeyboardInterrupt from None
    print(report_trial(TrialResult(trial.folder)))
    print(f'Report, picture, JSON and the CSV of all epochs are in {trial.folder}')
    if failed:
        logs = ', '.join(f"'{run.folder / LOG_FILE}'" for run in failed)
        raise ValueError(f'{len(failed)} runs ended with an error: see {logs}. The same command tries them again.')


def read_fingerprints(trial: Trial) -> dict[str, str]:
    """Returns the fingerprints of the given scales that runs still train with, by arm.

    A trial whose runs are all finished can do without the files.
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


def command_of(run: Run, trial: Trial) -> list[str]:
    """Writes the arguments of a run into its folder, and returns its command."""
    # A command line cannot turn a flag off, nor give null.
    config = run.folder / 'config.yaml'
    write_text(config, yaml.safe_dump({**trial.shared, **run.arguments}, sort_keys=False))
    where = ['--output', str(run.folder.parent), '--experiment', run.folder.name, '--resume']
    return [sys.executable, '-m', 'repopt_timm.cli', 'train', '-c', str(config), *where]


def run_all(
    trial: Trial, jobs: int, threads: int, command: Callable[[Run, Trial], list[str]] = command_of
) -> list[Run]:
    """Runs what there is to run until nothing is left, in so many processes of so many threads.

    Returns the runs that ended with an error other than that they diverged. On Ctrl-C or SIGTERM the processes end
    after their batch, and an InterruptedRunError is raised.
    """
    running: dict[subprocess.Popen, Run] = {}
    failed: list[Run] = []
    environment = {**os.environ, 'OMP_NUM_THREADS': str(threads)}
    with postponed_signals():
        try:
            while True:
                taken = [run.folder for run in (*running.values(), *failed)]
                ready = [run for run in trial.open_runs() if run.folder not in taken]
                if not running and not ready:
                    return failed
                # A process of a trial that was killed may still be at it.
                for run in [run for run in ready if not is_busy(run.folder)][: jobs - len(running)]:
                    run.folder.mkdir(parents=True, exist_ok=True)
                    _logger.info(f'{run.folder} starts.')
                    with open(run.folder / LOG_FILE, 'a', encoding='utf-8') as log:
                        # In a session of its own, as Ctrl-C would reach it twice.
                        streams: Any = {'stdin': subprocess.DEVNULL, 'stdout': log, 'stderr': log}
                        words = command(run, trial)
                        process = subprocess.Popen(words, env=environment, start_new_session=True, **streams)
                    running[process] = run
                ended: list[subprocess.Popen] = []
                while not ended:
                    raise_if_interrupted()
                    time.sleep(0.2)
                    ended = [process for process in running if process.poll() is not None]
                    if not running:
                        break
                failed += [run for run in map(running.pop, ended) if not _has_outcome(run)]
        finally:
            _stop(running)


def _has_outcome(run: Run) -> bool:
    """Notes the end of a run's process, and returns whether it finished or diverged."""
    if not math.isnan(run.top1):
        for path in run.folder.glob('*.pth.tar') if run.kind == 'tuning' else ():
            path.unlink()
        _logger.info(f'{run.folder} is done: top-1 {run.top1:.2f} %.')
    elif run.failure:
        _logger.warning(f'{run.folder} diverged: {run.failure}')
    else:
        _logger.warning(f"{run.folder} ended with an error: see '{run.folder / LOG_FILE}'.")
    return not run.is_open


def _stop(processes: Iterable[subprocess.Popen]) -> None:
    """Lets processes end after their batch; a second Ctrl-C ends them at once."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
