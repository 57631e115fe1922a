"""The folder of a run: one process trains in it, and a failure before the first checkpoint leaves none."""

import csv
import io
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from ..files import remove_temporaries, write_text

__all__ = [
    'ARGUMENTS_FILE',
    'BEST_CHECKPOINT',
    'DIVERGED_FILE',
    'LAST_CHECKPOINT',
    'SCALES_FILE',
    'SUMMARY_FILE',
    'TIMES_FILE',
    'is_busy',
    'run_folder',
    'write_epochs',
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
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):
                    for parent in missing[1:]:
                        parent.rmdir()
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


def write_epochs(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a row for each epoch as CSV. Epochs are counted from 1 there, as in the log."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(name for row in rows for name in row)), lineterminator='\n')
    writer.writeheader()
    writer.writerows({**row, 'epoch': row['epoch'] + 1} for row in rows)
    write_text(path, buffer.getvalue())


def _acquire(lock: IO[str], folder: Path) -> None:
    if fcntl is None:
        return
    try:
        # Of this process alone, unlike flock's, which the workers of loaders would go on holding after its death.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        raise ValueError(
            f"Another process trains in '{folder}' already ({lock.read().strip()}): wait for its end, or "
            f'choose another --experiment.'
        ) from None
    except OSError:
        # A file system without locks.
        return
    lock.truncate(0)
    lock.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    lock.flush()
