"""Runs side by side, each a process of the training command that goes on where it stopped."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from ..files import write_text
from ..train.interruption import InterruptedRunError, postponed_signals, raise_if_interrupted
from ..train.run_folder import is_busy
from .trial_folder import Run, Trial

__all__ = ['LOG_FILE', 'command_of', 'run_all']

LOG_FILE = 'train.log'

_logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_STOP_SECONDS = 120.0
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]


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
    """Runs what there is to run until nothing is left.

    Args:
        trial: The trial.
        jobs: Number of processes.
        threads: Threads of each.
        command: Returns the command of a run, which leaves its result in its folder.

    Returns:
        The runs that ended with an error other than that they diverged.

    Raises:
        KeyboardInterrupt: On Ctrl-C or SIGTERM, after the processes have ended.
    """
    running: dict[Path, tuple[Run, subprocess.Popen]] = {}
    failed: dict[Path, Run] = {}
    with postponed_signals():
        try:
            while True:
                raise_if_interrupted()
                for folder in [folder for folder, (_, process) in running.items() if process.poll() is not None]:
                    run, process = running.pop(folder)
                    if not _has_outcome(run, process.returncode):
                        failed[folder] = run
                ready = [run for run in trial.open_runs() if run.folder not in running | failed]
                # One of another trial's processes may be at it.
                for run in [run for run in ready if not is_busy(run.folder)][: jobs - len(running)]:
                    running[run.folder] = run, _start(run, command(run, trial), threads)
                if not running and not ready:
                    return list(failed.values())
                while running and all(process.poll() is None for _, process in running.values()):
                    raise_if_interrupted()
                    time.sleep(_POLL_SECONDS)
                if not running:
                    time.sleep(10 * _POLL_SECONDS)
        except InterruptedRunError:
            raise KeyboardInterrupt from None
        finally:
            _stop([process for _, process in running.values()])


def _start(run: Run, command: list[str], threads: int) -> subprocess.Popen:
    run.folder.mkdir(parents=True, exist_ok=True)
    _logger.info(f'{run.folder} starts.')
    # A checkout need not be installed.
    path = os.pathsep.join(filter(None, (str(_PACKAGE_PARENT), os.environ.get('PYTHONPATH'))))
    environment = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'PYTHONPATH': path}
    with open(run.folder / LOG_FILE, 'a', encoding='utf-8') as log:
        # In a session of its own, as Ctrl-C would reach it twice.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _has_outcome(run: Run, code: int) -> bool:
    """Notes the end of a run's process, and returns whether the run has an outcome, or another process goes on."""
    if run.top1 is not None:
        for path in run.folder.glob('*.pth.tar') if run.kind == 'tuning' else ():
            path.unlink()
        _logger.info(f'{run.folder} is done: top-1 {run.top1:.2f} %.')
    elif run.failure:
        _logger.warning(f'{run.folder} diverged: {run.failure}')
    elif not is_busy(run.folder):
        _logger.warning(f"{run.folder} ended with exit code {code}: see '{run.folder / LOG_FILE}'.")
        return False
    return True


def _stop(processes: list[subprocess.Popen]) -> None:
    """Asks processes to end after their batch, and ends the others."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + _STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
