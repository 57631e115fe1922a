"""Runs side by side, each a process of the training command that goes on where it stopped."""

import argparse
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..files import write_text
from ..train.interruption import InterruptedRunError, postponed_signals, raise_if_interrupted
from ..train.parsing import write_config
from ..train.run_folder import is_busy
from .trial_runs import CONFIG_FILE, LOG_FILE, Run

__all__ = ['prepare', 'run_all', 'threads_of']

_logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_BUSY_SECONDS = 10.0
_STOP_SECONDS = 120.0
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def prepare(run: Run, shared: argparse.Namespace) -> list[str]:
    """Writes the arguments of a run into its folder, and returns its command; `shared` is what all runs share."""
    # A command line cannot turn a flag off, nor give null.
    arguments = argparse.Namespace(**{**vars(shared), **run.arguments})
    write_text(run.folder / CONFIG_FILE, write_config(arguments))
    config = ['-c', str(run.folder / CONFIG_FILE)]
    where = ['--output', str(run.folder.parent), '--experiment', run.folder.name, '--resume']
    return [sys.executable, '-m', 'repopt_timm.cli', 'train', *config, *where]


def run_all(next_runs: Callable[[], Sequence[Run]], shared: argparse.Namespace, jobs: int, threads: int) -> list[Run]:
    """Runs what there is to run until nothing is left.

    Args:
        next_runs: Returns the runs that can start, the most urgent first; called again whenever one has ended.
        shared: The arguments that all runs share.
        jobs: Number of processes.
        threads: Threads of each.

    Returns:
        The runs that ended with an error other than that they diverged.

    Raises:
        KeyboardInterrupt: On Ctrl-C or SIGTERM, after the processes have ended.
    """
    environment = _environment(threads)
    running: dict[Run, subprocess.Popen] = {}
    failed: list[Run] = []
    with postponed_signals():
        try:
            while True:
                raise_if_interrupted()
                ready = [run for run in next_runs() if run not in running and run not in failed]
                free = [run for run in ready if not is_busy(run.folder)]
                for run in free[: jobs - len(running)]:
                    running[run] = _start(run, shared, environment)
                if not running and not ready:
                    return failed
                _wait(running)
                for run in [run for run, process in running.items() if process.poll() is not None]:
                    if not _end(run, running.pop(run).returncode):
                        failed.append(run)
        except InterruptedRunError:
            _stop(running)
            raise KeyboardInterrupt from None
        except BaseException:
            _stop(running)
            raise


def threads_of(jobs: int, threads: int | None) -> int:
    """Returns the threads of a run: `threads`, `OMP_NUM_THREADS`, or the cores of the machine divided by `jobs`."""
    given = os.environ.get('OMP_NUM_THREADS', '')
    if threads is None and given.isdecimal() and int(given):
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return threads or max(1, cores // jobs)


def _environment(threads: int) -> dict[str, str]:
    # A checkout need not be installed.
    path = os.pathsep.join(filter(None, (str(_PACKAGE_PARENT), os.environ.get('PYTHONPATH'))))
    return {**os.environ, 'OMP_NUM_THREADS': str(threads), 'PYTHONPATH': path}


def _start(run: Run, shared: argparse.Namespace, environment: dict[str, str]) -> subprocess.Popen:
    run.folder.mkdir(parents=True, exist_ok=True)
    command = prepare(run, shared)
    _logger.info(f'{run.folder} starts.')
    with open(run.folder / LOG_FILE, 'a', encoding='utf-8') as log:
        # In a session of its own, as Ctrl-C would reach it twice.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def _wait(running: dict[Run, subprocess.Popen]) -> None:
    # Without processes of its own, the trial waits for one of another trial.
    end = time.monotonic() + _BUSY_SECONDS
    while all(process.poll() is None for process in running.values()):
        time.sleep(_POLL_SECONDS)
        raise_if_interrupted()
        if not running and time.monotonic() > end:
            return


def _end(run: Run, code: int) -> bool:
    """Notes the end of a run's process, and returns whether the run has an outcome."""
    outcome = run.outcome
    if outcome.finished:
        if not run.keep_checkpoints:
            for path in run.folder.glob('*.pth.tar'):
                path.unlink()
        _logger.info(f'{run.folder} is done: top-1 {outcome.top1:.2f} %.')
        return True
    if outcome.failure:
        _logger.warning(f'{run.folder} diverged: {outcome.failure}')
        return True
    if is_busy(run.folder):
        return True
    _logger.warning(f"{run.folder} ended with exit code {code}: see '{run.folder / LOG_FILE}'.")
    return False


def _stop(running: dict[Run, subprocess.Popen]) -> None:
    """Asks processes to end after their batch, and ends the others."""
    for process in running.values():
        process.terminate()
    end = time.monotonic() + _STOP_SECONDS
    for process in running.values():
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
