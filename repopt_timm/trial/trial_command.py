"""`repopt-timm trial`: its runs side by side, each a process of the training command, and their report."""

import argparse
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

try:
    import matplotlib  # noqa: F401
    import pandas  # noqa: F401
except ImportError:
    raise ImportError("A trial needs pandas and matplotlib: pip install 'repopt-timm[trial]'.") from None
import torch
import yaml

from ..datasets import count_classes
from ..files import write_text
from ..sources import load_scales
from ..train.interruption import InterruptedRunError, postponed_signals, raise_if_interrupted
from ..train.loaders import make_datasets
from ..train.run import prepare_device
from ..train.validation import check_arguments
from .arms import target_name
from .networks import make_network, measure_networks
from .report import report_trial, report_trials
from .results import TrialResult
from .trial_folder import Run, Trial
from .trial_settings import read_arguments, read_shared, read_trial

LOG_FILE = 'train.log'

_logger = logging.getLogger(__name__)


def main(argv: Sequence[str], command: Callable[[Run, Trial], list[str]] | None = None) -> None:
    """Runs a trial, or makes reports of trials, from the words after `repopt-timm trial`.

    `command` writes the config of a run and returns its command, in place of `command_of`.
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
    trial = read_trial(args, model, shared)
    # Whatever is wrong is found before anything trains.
    holdout = trial.holdout if trial.lr is None else 0.0
    checked = argparse.Namespace(**{**shared, 'holdout': holdout, 'resume': None, 'override': False})
    prepare_device(checked)
    check_arguments(checked)
    train, validation = make_datasets(checked)
    classes = count_classes(train) or checked.num_classes
    trial = replace(trial, classes=classes, held_out=len(validation) if holdout else None)
    trial = replace(trial, fingerprints=read_fingerprints(trial))
    joined = trial.joined(args.reference)
    threads = args.threads or int(os.environ.get('OMP_NUM_THREADS') or max(1, torch.get_num_threads() // args.jobs))
    torch.set_num_threads(threads)
    measure_networks(joined, torch.device(checked.device))
    # The runs are other processes, which need the memory.
    torch.cuda.empty_cache()
    # Only now: a network that cannot be made leaves the folder to the command that is right.
    joined.write()
    try:
        failed = run_all(trial, args.jobs, threads, command or command_of)
    except InterruptedRunError:
        print('Stopped. The same command continues the trial.', file=sys.stderr)
        raise KeyboardInterrupt from None
    print(report_trial(TrialResult(trial.folder)))
    print(f'Report, picture, JSON and the CSV of all epochs are in {trial.folder}')
    if failed:
        logs = ', '.join(f"'{run.folder / LOG_FILE}'" for run in failed)
        raise ValueError(f'{len(failed)} runs ended with an error: see {logs}. The same command tries them again.')


def read_fingerprints(trial: Trial) -> dict[str, str]:
    """Returns arm to fingerprint of the given scales that runs still train with; finished runs need no files."""
    needed = {run.arguments.get('scales') for run in trial.open_runs()}
    given = trial.scales
    sources = {arm: given[arm] for arm in trial.arms if arm in given and given[arm] in needed}
    network = make_network(trial) if sources else None
    return {arm: load_scales(source, network).fingerprint for arm, source in sources.items()}


def command_of(run: Run, trial: Trial) -> list[str]:
    """Writes the arguments of a run into its folder, and returns its command."""
    # A command line cannot turn most flags off, nor give null.
    config = run.folder / 'config.yaml'
    write_text(config, yaml.safe_dump({**trial.shared, **run.arguments}, sort_keys=False))
    where = ['--output', str(run.folder.parent), '--experiment', run.folder.name]
    # A new run would say that it has no checkpoint to resume from.
    where += ['--resume'] if any(run.folder.glob('*.pth.tar')) else []
    return [sys.executable, '-m', 'repopt_timm.cli', 'train', '-c', str(config), *where]


def run_all(trial: Trial, jobs: int, threads: int, command: Callable[[Run, Trial], list[str]]) -> list[Run]:
    """Starts open runs, `jobs` at a time with `threads` threads each, and returns the ones that ended with an error.

    On Ctrl-C or SIGTERM the processes end after their batch, and an InterruptedRunError is raised.
    """
    running: dict[subprocess.Popen, Run] = {}
    failed: list[Run] = []
    environment = {**os.environ, 'OMP_NUM_THREADS': str(threads)}
    with postponed_signals():
        try:
            while True:
                taken = [run.folder for run in (*running.values(), *failed)]
                ready = [run for run in trial.open_runs() if run.folder not in taken]
                for run in ready[: jobs - len(running)]:
                    run.folder.mkdir(parents=True, exist_ok=True)
                    _logger.info(f'{run.folder} starts.')
                    with open(run.folder / LOG_FILE, 'a', encoding='utf-8') as log:
                        # In a session of its own, as Ctrl-C would reach it twice.
                        streams: Any = {'stdin': subprocess.DEVNULL, 'stdout': log, 'stderr': log}
                        words = command(run, trial)
                        process = subprocess.Popen(words, env=environment, start_new_session=True, **streams)
                    running[process] = run
                if not running:
                    return failed
                while all(process.poll() is None for process in running):
                    raise_if_interrupted()
                    time.sleep(0.2)
                for run in [running.pop(process) for process in list(running) if process.poll() is not None]:
                    if run.is_open:
                        failed.append(run)
                        _logger.warning(f"{run.folder} ended with an error: see '{run.folder / LOG_FILE}'.")
                        continue
                    _logger.info(f'{run.folder} is done: {run.failure or f"top-1 {run.top1:.2f} %"}')
                    if run.kind == 'tuning':
                        for path in run.folder.glob('*.pth.tar'):
                            path.unlink()
        finally:
            # A second Ctrl-C ends them at once.
            for process in running:
                process.terminate()
            try:
                for process in running:
                    process.wait()
            except KeyboardInterrupt:
                for process in running:
                    process.kill()
