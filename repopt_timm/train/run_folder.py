"""The folder of a run: one process trains in it, and a failure before the first checkpoint leaves none."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from ..files import remove_temporaries

__all__ = ['ARGUMENTS_FILE', 'BEST_CHECKPOINT', 'LAST_CHECKPOINT', 'SUMMARY_FILE', 'run_folder']

ARGUMENTS_FILE = 'args.yaml'
BEST_CHECKPOINT = 'model_best.pth.tar'
LAST_CHECKPOINT = 'last.pth.tar'
SUMMARY_FILE = 'summary.csv'
_LOCK_FILE = '.lock'


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Makes and locks a run's folder, and removes it again if it is new and an error leaves no checkpoint in it.

    Raises:
        ValueError: If another process trains in it.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK_FILE, 'a+') as lock:
        _acquire(lock, folder)
        remove_temporaries(folder)
        try:
            yield
        except BaseException:
            if missing and not (folder / LAST_CHECKPOINT).exists():
                _remove(missing)
            raise


def _acquire(lock: IO[str], folder: Path) -> None:
    if fcntl is None:
        return
    try:
        # Of this process alone, unlike flock's, which the workers of loaders would go on holding after its death.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not isinstance(error, BlockingIOError | PermissionError):
            # A file system without locks.
            return
        lock.seek(0)
        raise ValueError(
            f"Another process trains in '{folder}' already ({lock.read().strip()}): wait for its end, or "
            f'choose another --experiment.'
        ) from None
    lock.truncate(0)
    lock.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    lock.flush()


def _remove(folders: list[Path]) -> None:
    shutil.rmtree(folders[0], ignore_errors=True)
    for folder in folders[1:]:
        try:
            folder.rmdir()
        except OSError:
            return
