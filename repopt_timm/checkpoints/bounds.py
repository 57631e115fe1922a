"""Bounds on what a file may claim to hold, which may come from anyone; no checkpoint comes near them."""

import os
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ['check_archive', 'check_content', 'check_header', 'check_pickle']

# L2, the largest network, has 500 tensors in a checkpoint of a run, and a header of 60 kB.
_MAX_HEADER_BYTES = 1 << 23
_MAX_TENSORS = 50_000
_MAX_OPERATIONS = 1_000_000
_MAX_VALUES = 300_000
_MAX_NESTING = 64
# Tied tensors stand there several times.
_MAX_TENSOR_BYTES = 1 << 28

# Those that call something, such as what makes a tensor of its arguments.
_CALLS = frozenset({'BUILD', 'INST', 'NEWOBJ', 'NEWOBJ_EX', 'OBJ', 'REDUCE'})
# An old file of torch begins with a number, a version and facts of the machine.
_LEADING_PICKLES = 4


def check_header(path: str | os.PathLike) -> None:
    """Checks the header of a safetensors file, whose reader takes kilobytes for each tensor in it.

    Raises:
        ValueError: If it is longer, or has more tensors, than any model needs.
    """
    with open(path, 'rb') as file:
        size = int.from_bytes(file.read(8), 'little')
        if size > _MAX_HEADER_BYTES:
            raise ValueError(f"'{path}' has a header of {size} bytes, expected at most {_MAX_HEADER_BYTES}.")
        # Each tensor is a mapping.
        tensors = file.read(size).count(b'{')
    if tensors > _MAX_TENSORS:
        raise ValueError(f"'{path}' has a header of {tensors} tensors, expected at most {_MAX_TENSORS}.")


def check_archive(path: str | os.PathLike) -> None:
    """Checks the parts of a checkpoint: their sizes, checksums, which torch writes and does not look at, and pickle.

    Raises:
        ValueError: If one is damaged, larger unpacked than packed, or has more in it than any checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(part.file_size for part in archive.infolist())
            if size > Path(path).stat().st_size:
                raise ValueError(f'its parts unpack to {size} bytes, more than the file has')
            damaged = archive.testzip()
            if damaged is None:
                for name in archive.namelist():
                    if name.endswith('/data.pkl'):
                        with archive.open(name) as file:
                            check_pickle(file, 1)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(f"'{path}' is damaged: {error}.") from None
    if damaged is not None:
        raise ValueError(f"'{path}' is damaged: its part {damaged} does not match its checksum.")


def check_pickle(file: Any, pickles: int = _LEADING_PICKLES) -> None:
    """Counts the operations of the first pickles in a file, without running any.

    Raises:
        ValueError: If there are more than in any checkpoint.
    """
    operations = calls = 0
    for _ in range(pickles):
        try:
            for opcode, _, _ in pickletools.genops(file):
                operations += 1
                calls += opcode.name in _CALLS
                if operations > _MAX_OPERATIONS or calls > _MAX_TENSORS:
                    break
        except (ValueError, OverflowError, MemoryError):
            # The reader says what is wrong with it.
            return
        if operations > _MAX_OPERATIONS or calls > _MAX_TENSORS:
            raise ValueError(f'it takes more than {_MAX_OPERATIONS} steps, or {_MAX_TENSORS} calls, to unpickle')


def check_content(content: object, path: str | os.PathLike) -> None:
    """Checks what came out of a pickle, where a few bytes can stand for a value that takes forever to walk through.

    Raises:
        ValueError: If it is nested too deep, or has more values or larger tensors than the file.
    """
    count = size = 0
    limit = _MAX_TENSOR_BYTES + 4 * Path(path).stat().st_size
    stack = [(content, 0)]
    while stack:
        value, depth = stack.pop()
        count += 1
        if count > _MAX_VALUES or depth > _MAX_NESTING:
            raise ValueError(f"'{path}' is refused: more than {_MAX_VALUES} values, or {_MAX_NESTING} levels of them.")
        if isinstance(value, Tensor):
            size += value.numel() * value.element_size()
            if size > limit:
                raise ValueError(f"'{path}' is refused: its tensors claim more values than the file holds.")
        elif isinstance(value, Mapping):
            stack += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list | tuple | set):
            stack += [(item, depth + 1) for item in value]
        elif hasattr(value, '__dict__'):
            stack.append((vars(value), depth + 1))
