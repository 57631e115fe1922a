"""The folder of a run: one process trains in it, and a failure before the first checkpoint leaves none."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from ..checkpoints.read import LAST_CHECKPOINT
from ..files import remove_temporaries, write_text

ARGUMENTS_FILE = 'args.yaml'
REPORT_FILE = 'report.md'
SCALES_FILE = 'scales.safetensors'
SUMMARY_FILE = 'summary.csv'
TIMES_FILE = 'times.csv'
DIVERGED_FILE = 'diverged.txt'
_LOCK_FILE = '.lock'


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Makes and locks a run's folder, and removes it again if it is new and an error leaves no checkpoint in it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK_FILE, 'a+') as lock:
        try:
            if fcntl is not None:
                # The workers of loaders would hold a lock of flock's after the death of this process.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"Another process is training in '{folder}': wait until it ends, or choose another --experiment."
            ) from None
        except OSError:
            # A file system without locks.
            pass
        remove_temporaries(folder)
        try:
            yield
        except BaseException:
            if missing and not (folder / LAST_CHECKPOINT).exists():
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):
                    for parent in missing[1:]:
                        parent.rmdir()
            raise


def write_epochs(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a row for each epoch as CSV. Epochs are counted from 1 there, as in the log."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[str(row.get(name, '')) for name in names] for row in ({**row, 'epoch': row['epoch'] + 1} for row in rows)]
    write_text(path, ''.join(','.join(line) + '\n' for line in [names, *cells]))
