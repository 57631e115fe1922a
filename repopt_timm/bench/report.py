"""Results as rows, goals that they are held against, and a table of them."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .measure import Spread, Timing

__all__ = ['Goal', 'Row', 'as_json', 'markdown', 'memory_rows', 'quantity', 'ratio_table', 'time_rows']


@dataclass(frozen=True)
class Goal:
    """The range that a ratio, or with `of_value` the measured value itself, should be in.

    Attributes:
        most: Upper end.
        least: Lower end, if there is one.
        strict: Whether the upper end itself misses the goal.
        of_value: Whether the measured value is compared, not its ratio.
        text: How the goal is told.
    """

    most: float
    text: str
    least: float | None = None
    strict: bool = False
    of_value: bool = False

    def is_reached(self, number: float) -> bool:
        """Tells whether a number is in the range."""
        if self.least is not None and number < self.least:
            return False
        return number < self.most if self.strict else number <= self.most


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        what: What was measured; rows of one table section have it in common.
        contender: Of which contender.
        value: The measured value, a median.
        unit: `s`, `B` for bytes, or what was counted.
        ratio: The value over that of `baseline`.
        baseline: What it is compared with.
        goal: What it should be, if there is a goal.
        at: Place on the axis, for measurements of a curve.
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
        """Whether the goal is reached; None without one."""
        if self.goal is None:
            return None
        if self.goal.of_value or self.ratio is None:
            return self.goal.is_reached(self.value)
        return self.goal.is_reached(self.ratio.median)


def time_rows(
    what: str, timings: dict[str, Timing], baseline: str, goals: dict[str, Goal] | None = None, at: float | None = None
) -> list[Row]:
    """Makes a row of each contender's timing.

    Args:
        what: What was timed.
        timings: What `paired` returned.
        baseline: Name of the contender that the ratios refer to.
        goals: Contender to goal.
        at: Place on the axis.
    """
    goals = goals or {}
    return [
        Row(what, name, timing.seconds.median, 's', timing.ratio, baseline, goals.get(name), at)
        for name, timing in timings.items()
    ]


def memory_rows(
    what: str, sizes: dict[str, int], baseline: str, goals: dict[str, Goal] | None = None, at: float | None = None
) -> list[Row]:
    """Makes a row of each contender's number of bytes.

    Args:
        what: What was measured.
        sizes: Contender to number of bytes.
        baseline: Name of the contender that the ratios refer to.
        goals: Contender to goal.
        at: Place on the axis.
    """
    goals = goals or {}
    return [
        Row(what, name, size, 'B', Spread.of([size / sizes[baseline]]), baseline, goals.get(name), at)
        for name, size in sizes.items()
    ]


def quantity(value: float, unit: str) -> str:
    """Writes a value with three significant digits and a unit of fitting size."""
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
    """Writes rows as a table: measured values, ratios with quartiles, goals."""
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
    return markdown([head[column] for column in used], [[line[column] for column in used] for line in lines])


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Writes a Markdown table whose columns line up, for terminals."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, tuple('-' * width for width in widths))
    return '\n'.join('| ' + ' | '.join(map(str.ljust, line, widths)) + ' |' for line in lines)


def as_json(row: Row) -> dict[str, Any]:
    """Returns a row as plain data, with whether its goal is reached."""
    return {**asdict(row), 'goal': row.goal.text if row.goal is not None else None, 'reached': row.reached}
