"""Errors that say what a user gave."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ['explaining', 'naming', 'reason_of']


@contextmanager
def explaining(what: str) -> Iterator[None]:
    """Turns what libraries raise over a bad argument into a ValueError that begins with `what`."""
    try:
        yield
    except (
        TypeError,
        AssertionError,
        KeyError,
        RuntimeError,
        AttributeError,
        IndexError,
        NotImplementedError,
        json.JSONDecodeError,
        UnicodeDecodeError,
    ) as error:
        text = ' '.join(str(error).split()) or type(error).__name__
        raise ValueError(f'{what}: {text}') from error


def reason_of(error: BaseException) -> str:
    """Returns what a library's error says, on one line of at most 300 characters; its type if it says nothing."""
    return ' '.join(str(error).split())[:300].rstrip('.') or type(error).__name__


@contextmanager
def naming(folder: object, name: object) -> Iterator[None]:
    """Calls a temporary folder in ValueErrors by the name of what its files are for."""
    try:
        yield
    except ValueError as error:
        if str(folder) not in str(error):
            raise
        raise ValueError(str(error).replace(str(folder), str(name))) from None
