"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ['remove_temporaries', 'replacing', 'write_text']

# In the name of a file that is being written.
_MARK = '.tmp'


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renames it to `path` on success and removes it on an error.

    A process that is killed half-way leaves the old file, or none. The temporary name keeps the suffix of `path`, so
    that libraries which choose a format by it do.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix='.' + path.stem + '-', suffix=_MARK + path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # `mkstemp` makes private files; give this one what a plain open() would.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding='utf-8', newline='\n')


def remove_temporaries(folder: str | os.PathLike) -> None:
    """Removes what processes that were killed in `replacing` left in a folder."""
    for path in Path(folder).glob(f'.*-*{_MARK}*'):
        path.unlink(missing_ok=True)
