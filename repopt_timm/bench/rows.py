"""Results as rows, their goals, and a table of them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..reporting import markdown_table

__all__ = ['RATIO_NOTE', 'Goal', 'Row', 'Spread', 'as_json', 'memory_rows', 'quantity', 'ratio_table', 'ratio_rows']

RATIO_NOTE = (
    'Times are medians. The candidates took turns in one process, in rounds whose order rotated; a ratio is the median '
    "of the rounds' ratios."
)


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
        """Summarizes one or more values."""
        quartiles = statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else [values[0]] * 3
        return cls(statistics.median(values), quartiles[0], quartiles[2], min(values), max(values))


@dataclass(frozen=True)
class Goal:
    """The range that a ratio, or with `of_value` the measured value itself, should be in.

    Attributes:
        most: Upper end.
        least: Lower end, if any.
        strict: Whether the upper end itself misses the goal.
        of_value: Whether the measured value is compared, not its ratio.
        text: How the goal reads.
    """

    most: float
    text: str
    least: float | None = None
    strict: bool = False
    of_value: bool = False

    def is_reached(self, number: float) -> bool:
        """Returns whether a number is in the range."""
        if self.least is not None and number < self.least:
            return False
        return number < self.most if self.strict else number <= self.most


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        what: What was measured, the same for all rows of a section of the table.
        contender: Name of the candidate or the baseline.
        value: The measured value, a median.
        unit: `s`, `B` for bytes, or what was counted.
        ratio: The value over that of `baseline`.
        baseline: Name of what it is compared with.
        goal: What it should be, if any.
        at: Position on the axis, for curves.
    """

    what: str
    contender: str
    value: float
    unit: str
    ratio: Spread | None = None
    baseline: str = ''
    goal: Goal | None = None
    at: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached, None without a goal."""
        if self.goal is None:
            return None
        if self.goal.of_value or self.ratio is None:
            return self.goal.is_reached(self.value)
        return self.goal.is_reached(self.ratio.median)


def ratio_rows(
    what: str,
    unit: str,
    values: Mapping[str, Sequence[float]],
    baseline: str,
    goals: Mapping[str, Goal] | None = None,
    at: float | None = None,
) -> list[Row]:
    """Makes a row of each candidate's values.

    Args:
        what: What was measured.
        unit: `s` or `B`.
        values: Candidate to the values of each round, which are compared with the baseline's of the same round.
        baseline: Name of the candidate that the ratios refer to.
        goals: Candidate to goal.
        at: Position on the axis.
    """
    goals = goals or {}
    rows = []
    for name, own in values.items():
        ratio = Spread.of([value / base for value, base in zip(own, values[baseline])])
        rows.append(Row(what, name, statistics.median(own), unit, ratio, baseline, goals.get(name), at))
    return rows


def memory_rows(
    what: str,
    sizes: Mapping[str, int],
    baseline: str,
    goals: Mapping[str, Goal] | None = None,
    at: float | None = None,
) -> list[Row]:
    """Makes a row of each candidate's number of bytes, see `ratio_rows`."""
    return ratio_rows(what, 'B', {name: [size] for name, size in sizes.items()}, baseline, goals, at)


def quantity(value: float, unit: str) -> str:
    """Formats a value with three significant digits and a unit of fitting size."""
    if unit == 's':
        for size, name in ((1.0, 's'), (1e-3, 'ms')):
            if value >= size:
                return f'{_digits(value / size)} {name}'
        return f'{_digits(value * 1e6)} µs'
    if unit == 'B':
        for size, name in ((2**30, 'GiB'), (2**20, 'MiB'), (2**10, 'KiB')):
            if value >= size:
                return f'{_digits(value / size)} {name}'
        return f'{value:.0f} B'
    return f'{value:g} {unit}'


def _digits(value: float) -> str:
    return f'{value:.0f}' if value >= 100 else f'{value:.3g}'


def _ratio(row: Row) -> str:
    if row.ratio is None or row.contender == row.baseline:
        return ''
    if row.ratio.lower == row.ratio.upper:
        return f'{row.ratio.median:.3f}'
    return f'{row.ratio.median:.3f} ({row.ratio.lower:.3f} to {row.ratio.upper:.3f})'


def ratio_table(rows: Sequence[Row]) -> str:
    """Formats rows as a table of measured values, ratios with quartiles, and goals."""
    head = ('what', 'at', 'contender', 'measured', 'ratio (quartiles)', 'to', 'goal', 'reached')
    lines = []
    previous = None
    for row in rows:
        lines.append(
            (
                '' if row.what == previous else row.what,
                '' if row.at is None else f'{row.at:g}',
                row.contender,
                quantity(row.value, row.unit),
                _ratio(row),
                '' if row.contender == row.baseline else row.baseline,
                '' if row.goal is None else row.goal.text,
                {None: '', True: 'yes', False: 'NO'}[row.reached],
            )
        )
        previous = row.what
    used = [column for column in range(len(head)) if any(line[column] for line in lines)]
    return markdown_table(
        [head[column] for column in used], [[line[column] for column in used] for line in lines], True
    )


def as_json(row: Row) -> dict[str, Any]:
    """Returns a row as plain data, including whether its goal is reached."""
    return {**asdict(row), 'goal': row.goal.text if row.goal is not None else None, 'reached': row.reached}
