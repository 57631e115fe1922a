"""Times contenders against each other, in turns in one process."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ['Spread', 'Timing', 'paired', 'synchronized']


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and range of some values."""

    median: float
    lower: float
    upper: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> 'Spread':
        """Summarizes values, of which there has to be one at least."""
        quartiles = statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else [values[0]] * 3
        return cls(statistics.median(values), quartiles[0], quartiles[2], min(values), max(values))


@dataclass(frozen=True)
class Timing:
    """How long a contender took.

    Attributes:
        seconds: Time of a call.
        ratio: Time of a call over that of the baseline's call in the same round.
    """

    seconds: Spread
    ratio: Spread


def paired(
    contenders: Mapping[str, Callable[[], Any]],
    baseline: str,
    rounds: int,
    warmup: int = 2,
    prepare: Callable[[], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times contenders in rounds, each contender once in a round.

    What slows the machine down for a while slows down a whole round, and drops out of the ratios inside it. The order
    rotates, so that no contender always finds the caches as the same other one left them.

    Args:
        contenders: Name to what is timed. Has to wait for its result, see `synchronized`.
        baseline: Name of the contender that the others are compared with.
        rounds: Number of rounds.
        warmup: Number of rounds before, which do not count.
        prepare: Called before each call, not timed.
        clock: Returns the time in seconds.

    Returns:
        Name to timing, in the order of `contenders`.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmup + rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            if prepare is not None:
                prepare()
            start = clock()
            contenders[name]()
            elapsed = clock() - start
            if index >= warmup:
                seconds[name].append(elapsed)
    return {
        name: Timing(Spread.of(times), Spread.of([own / base for own, base in zip(times, seconds[baseline])]))
        for name, times in seconds.items()
    }


def synchronized(call: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """Makes a call wait until the device has finished what it asked for."""

    def run() -> None:
        call()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)

    return run
