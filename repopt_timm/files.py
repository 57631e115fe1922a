"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

# In the name of a file that is being written.
_MARK = '.tmp'


@contextmanager
def naming_write_errors(path: str | os.PathLike) -> Iterator[None]:
    """Names the file in errors such as that of a full disk, which state the cause alone."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and (error.filename or not error.strerror):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise OSError(f"'{path}' cannot be written: {reason}.") from None


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renames it to `path` on success and removes it on an error.

    A process that is killed half-way leaves the old file, or none. The temporary name keeps the suffix of `path`, by
    which libraries choose a format. If `path` is a symbolic link, the file that it points to is replaced.
    """
    path = check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.stem}-{uuid4().hex}{_MARK}{path.suffix}')
    try:
        with naming_write_errors(path):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
        # Libraries that replace the file may make a private one.
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding='utf-8', newline='\n')


def check_output(path: str | os.PathLike, *inputs: str | os.PathLike) -> Path:
    """Checks that a file can be written, and is none of the inputs, before the work that makes its content.

    Returns the file to write: `path` itself, or where its symbolic link points, so that the link stays.
    """
    target = Path(os.path.realpath(path))
    problem = ''
    if target.is_dir():
        problem = 'it is a folder, expected a file name'
    elif target.exists() and not target.is_file():
        problem = 'it is a device or a pipe, expected a regular file or a new name'
    elif any(target.exists() and os.path.exists(source) and target.samefile(source) for source in inputs):
        problem = 'it is the input itself. Name another file'
    elif not (folder := _existing(target.parent)).is_dir():
        problem = f"'{folder}' is not a folder"
    if problem:
        raise ValueError(f"'{path}' cannot be written: {problem}.")
    return target


def check_output_folder(path: str | os.PathLike) -> Path:
    """Checks that a folder can be made, or is there, before the work that makes its content."""
    if not (folder := _existing(Path(path).absolute())).is_dir():
        raise ValueError(f"'{path}' cannot be written: '{folder}' is not a folder.")
    return Path(path)


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def remove_temporaries(folder: str | os.PathLike) -> None:
    """Removes what processes that were killed in `replacing` left in a folder."""
    for path in Path(folder).glob(f'.*-*{_MARK}*'):
        path.unlink(missing_ok=True)
