"""Reading back the small files of runs and trials, which may have been cut off or edited."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def read_table(path: str | os.PathLike, columns: Sequence[str] = ()) -> list[dict[str, float]]:
    """Reads a CSV file of numbers, such as `summary.csv`; no rows if there is none.

    Cells may be empty, but not in `columns`; rows leave them out. A file that is cut off, even in the middle of a
    number, is an error.
    """
    try:
        head, *lines = csv.reader(_complete(path).splitlines())
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = {name: float(cell) for name, cell in zip(head, line, strict=True) if cell}
        except ValueError as error:
            raise _damaged(path, f'it has the line {line}: {error}') from None
        if missing := [name for name in columns if name not in row]:
            raise _damaged(path, f'its line {line} has no {", ".join(missing)}')
        rows.append(row)
    return rows


def read_mapping(path: str | os.PathLike, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a YAML file, or JSON if it is called so, of names and values, among them `keys`."""
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
