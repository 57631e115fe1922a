"""Bounds on what a file may claim to hold, which may come from anyone; no checkpoint comes near them."""

import os
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
# Those that fill what is already there, instead of making something of it.
_FILLS = frozenset({'ADDITEMS', 'APPEND', 'APPENDS', 'BUILD', 'SETITEM', 'SETITEMS'})
# An old file of torch has a number, a version, facts of the machine, the content, and the names of its storages.
_LEADING_PICKLES = 5

# Each part of an archive has an entry in the directory at its end, of some hundred bytes.
_ENTRY_START = b'PK\x01\x02'
_DIRECTORY_BYTES = 1 << 26


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
    with open(path, 'rb') as content:
        content.seek(max(0, Path(path).stat().st_size - _DIRECTORY_BYTES))
        parts = content.read().count(_ENTRY_START)
    if parts > _MAX_TENSORS:
        raise ValueError(f"'{path}' is refused: it has {parts} parts, expected at most {_MAX_TENSORS}.")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(part.file_size for part in archive.infolist())
            if size > Path(path).stat().st_size:
                raise ValueError(f'its parts unpack to {size} bytes, more than the file has')
            damaged = archive.testzip()
            if damaged is None:
                for part in archive.infolist():
                    # torch finds it whatever its case, and of two with this name either may be the one that it reads.
                    if part.filename.lower().endswith('data.pkl'):
                        with archive.open(part) as file:
                            check_pickle(file, 1)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(f"'{path}' is damaged: {error}.") from None
    if damaged is not None:
        raise ValueError(f"'{path}' is damaged: its part {damaged} does not match its checksum.")


def check_pickle(file: Any, pickles: int = _LEADING_PICKLES) -> None:
    """Counts the operations of the first pickles in a file, without running any.

    What is used again counts again: a tuple of twice the same tuple, and so on, takes forever to hash as a key.

    Raises:
        ValueError: If there are more than in any checkpoint, or a value is nested too deep.
    """
    operations = calls = 0
    for _ in range(pickles):
        stack = _Stack()
        try:
            for opcode, argument, _ in pickletools.genops(file):
                operations += stack.apply(opcode, argument)
                calls += opcode.name in _CALLS
                if operations > _MAX_OPERATIONS or calls > _MAX_TENSORS or stack.depth > _MAX_NESTING:
                    break
        except (IndexError, KeyError, ValueError, OverflowError, MemoryError):
            # The reader says what is wrong with it.
            return
        if operations > _MAX_OPERATIONS or calls > _MAX_TENSORS:
            raise ValueError(f'it takes more than {_MAX_OPERATIONS} steps, or {_MAX_TENSORS} calls, to unpickle')
        if stack.depth > _MAX_NESTING:
            raise ValueError(f'its values are nested more than {_MAX_NESTING} levels deep')


class _Value(NamedTuple):
    """What a pickle makes: its parts, counted once for each use, and how deep they are nested."""

    size: int = 1
    depth: int = 0


class _Stack:
    """The stack and the memory of an unpickler, of sizes instead of values."""

    def __init__(self) -> None:
        self.values: list[_Value | None] = []
        self.marks: list[int] = []
        self.memory: dict[Any, _Value] = {}
        self.depth = 0

    def apply(self, opcode: Any, argument: Any) -> int:
        """Does what an operation does to the stack; returns how much it adds to the work."""
        name = opcode.name
        if name.endswith('PUT') or name == 'MEMOIZE':
            self.memory[len(self.memory) if argument is None else argument] = self._top()
        elif name.endswith('GET') or name == 'DUP':
            value = self._top() if name == 'DUP' else self.memory[argument]
            self.values.append(value)
            return value.size
        elif name == 'MARK':
            self.marks.append(len(self.values))
            self.values.append(None)
        else:
            parts = self._pop(opcode.stack_before)
            if opcode.stack_after:
                self.values.append(self._made_of(parts, name in _FILLS))
        return 1

    def _top(self) -> _Value:
        return self.values[-1] or _Value()

    def _pop(self, before: list[Any]) -> list[_Value]:
        start = len(self.values) - len(before)
        if pickletools.markobject in before:
            start = self.marks[-1] - before.index(pickletools.markobject)
        if start < 0:
            raise IndexError
        parts = self.values[start:]
        del self.values[start:]
        while self.marks and self.marks[-1] >= start:
            self.marks.pop()
        return [part for part in parts if part is not None]

    def _made_of(self, parts: list[_Value], fills: bool) -> _Value:
        size = 1 + sum(part.size for part in parts)
        inside = max((part.depth for part in parts[fills:]), default=-1) + 1
        depth = max(inside, parts[0].depth) if fills and parts else inside
        self.depth = max(self.depth, depth)
        return _Value(size, depth)


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
