"""Ctrl-C and SIGTERM end a run between two batches."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_received: list[int] = []


class InterruptedRunError(Exception):
    """A signal asked the run in `folder` to end."""

    folder = Path()

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def raise_if_interrupted() -> None:
    """Raises an InterruptedRunError if a signal arrived; called where nothing is half done."""
    if _received:
        raise InterruptedRunError(_received[0])


@contextmanager
def postponed_signals() -> Iterator[None]:
    """Notes SIGINT and SIGTERM for `raise_if_interrupted`; a second one raises KeyboardInterrupt at once.

    An exception out of a signal handler can be lost while loaders fork, and would hit a half-written state elsewhere.
    """

    def note(signum: int, frame: Any) -> None:
        if _received:
            raise KeyboardInterrupt
        _received.append(signum)

    previous = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except RuntimeError as error:
        if 'DataLoader worker' in str(error):
            # A signal to the whole group may end a loader's worker before it is heard here.
            time.sleep(0.2)
            raise_if_interrupted()
        raise
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        _received.clear()
