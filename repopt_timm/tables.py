"""Reading back the small files of runs and trials, which may have been cut off or edited."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ['read_mapping', 'read_table']


def read_table(path: str | os.PathLike, columns: Sequence[str] = ()) -> list[dict[str, float]]:
    """Reads a CSV file of numbers, such as `summary.csv`.

    Args:
        path: The file: a header, and lines of as many numbers. Cells may be empty.
        columns: Columns that have a number in each row.

    Returns:
        A row for each line, without its empty cells; nothing if the file does not exist.

    Raises:
        ValueError: If the file is empty, cut off, even in the middle of a number, or not of this form; names it.
    """
    try:
        lines = list(csv.reader(_complete(path).splitlines()))
    except FileNotFoundError:
        return []
    head = lines[0]
    if missing := [name for name in columns if name not in head]:
        raise _damaged(path, f'its header has no {", ".join(missing)}')
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(head):
            raise _damaged(path, f'line {number} has {len(line)} cells and the header {len(head)}')
        try:
            row = {name: float(cell) for name, cell in zip(head, line) if cell}
        except ValueError as error:
            raise _damaged(path, f'line {number}: {error}') from None
        if missing := [name for name in columns if name not in row]:
            raise _damaged(path, f'line {number} has no {", ".join(missing)}')
        rows.append(row)
    return rows


def read_mapping(path: str | os.PathLike, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a YAML file, or JSON if it is called so, of names and values.

    Args:
        path: The file.
        keys: Names that it has to have.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty, cut off, or not of this form; names it.
    """
    text = _complete(path)
    try:
        found = json.loads(text) if str(path).endswith('.json') else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise _damaged(path, ' '.join(str(error).split())) from None
    if not isinstance(found, dict):
        raise _damaged(path, f'it holds a {type(found).__name__}, expected names with values')
    if missing := [name for name in keys if name not in found]:
        raise _damaged(path, f'it has no {", ".join(missing)}')
    return found


def _complete(path: str | os.PathLike) -> str:
    try:
        text = Path(path).read_bytes().decode('utf-8')
    except UnicodeDecodeError:
        raise _damaged(path, 'it is not UTF-8 text') from None
    if not text.endswith('\n'):
        raise _damaged(path, 'it is empty' if not text else 'it is cut off: its last line has no end')
    return text


def _damaged(path: str | os.PathLike, problem: str) -> ValueError:
    return ValueError(f"'{path}' is damaged: {problem}.")
