"""The folder of a run: one process trains in it, and a failure before the first checkpoint leaves none."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from ..files import remove_temporaries

__all__ = [
    'ARGUMENTS_FILE',
    'BEST_CHECKPOINT',
    'DIVERGED_FILE',
    'LAST_CHECKPOINT',
    'SCALES_FILE',
    'SUMMARY_FILE',
    'TIMES_FILE',
    'is_busy',
    'note_time',
    'run_folder',
    'saved_argument',
]

ARGUMENTS_FILE = 'args.yaml'
BEST_CHECKPOINT = 'model_best.pth.tar'
LAST_CHECKPOINT = 'last.pth.tar'
SCALES_FILE = 'scales.safetensors'
SUMMARY_FILE = 'summary.csv'
TIMES_FILE = 'times.csv'
DIVERGED_FILE = 'diverged.txt'
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
        except BaseException as error:
            if missing and not (folder / LAST_CHECKPOINT).exists():
                _remove(missing)
            if (folder / SUMMARY_FILE).exists():
                # For the last resort of the command line.
                error.repopt_log = folder / SUMMARY_FILE  # type: ignore[attr-defined]
            raise


def is_busy(folder: Path) -> bool:
    """Returns whether another process trains in a run's folder."""
    if fcntl is None:
        return False
    try:
        with open(folder / _LOCK_FILE) as lock:
            # Shared, for which one need not be allowed to write the file.
            fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        # Either is a lock of another process, but with its name it is a file that may not be read.
        return isinstance(error, BlockingIOError | PermissionError) and error.filename is None
    return False


def saved_argument(folder: Path, name: str, kind: type) -> Any:
    """Returns what `args.yaml` in a run's folder says of an argument; None if there is nothing of this kind."""
    try:
        saved = yaml.safe_load((folder / ARGUMENTS_FILE).read_text(encoding='utf-8'))
    except (FileNotFoundError, yaml.YAMLError, UnicodeDecodeError):
        return None
    found = saved.get(name) if isinstance(saved, dict) else None
    return found if isinstance(found, kind) else None


def note_time(folder: Path, epoch: int, seconds: float) -> None:
    """Adds the seconds that an epoch's training took to `times.csv`; of an epoch that was repeated the last line holds.

    Apart from `summary.csv`, which is the same each time that a run is repeated.
    """
    path = folder / TIMES_FILE
    head = '' if path.exists() else 'epoch,train_seconds\n'
    with open(path, 'a', encoding='utf-8', newline='\n') as file:
        file.write(f'{head}{epoch},{seconds:.3f}\n')


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
