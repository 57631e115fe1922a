"""One argument of a training run: its type and limits, and how its text is read and checked."""

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ['ANY_COUNT', 'Argument']

ANY_COUNT = tuple(range(1, 1000))
"""`count` of a list of any length."""

_TRUE, _FALSE = ('true', 'yes', '1'), ('false', 'no', '0')
_LARGEST_INT = 2**31 - 1


@dataclass(frozen=True)
class Argument:
    """One argument, on the command line, in a config and in `--search-kwargs`.

    Attributes:
        name: Name in a config; the flag is `--name` with dashes.
        kind: `str`, `int`, `float`, `bool`, or `dict` for K=V pairs.
        default: Value if it is not given.
        help: What it is.
        low: Smallest value.
        above: Value that it has to exceed.
        high: Largest value.
        below: Value that it has to stay below.
        choices: The values that a text can have.
        count: Numbers of values that a list can have; a single value without.
        short: Short flag.
        metavar: Name of the value in the help.
        const: Value of the flag without one.
        optional: Whether a config may set it to null although that is not the default.
        free: Whether a resumed run may change it without `--override`.
        any_case: Whether capitals do not matter in a text, which is kept in lower case.
    """

    name: str
    kind: type
    default: Any = None
    help: str = ''
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    count: tuple[int, ...] = ()
    short: str = ''
    metavar: str | None = None
    const: str | None = None
    optional: bool = False
    free: bool = False
    any_case: bool = False

    @property
    def flag(self) -> str:
        return '--' + self.name.replace('_', '-')

    @property
    def expected(self) -> str:
        """What values it can have, in words."""
        if self.choices:
            return 'one of ' + ', '.join(repr(choice) for choice in self.choices)
        if self.kind is dict:
            return "'argument: value' pairs"
        if self.kind is bool:
            return 'true or false'
        if self.kind is str:
            return 'text'
        limits = [('at least', self.low), ('above', self.above), ('at most', self.high), ('below', self.below)]
        limits_text = ' and '.join(f'{word} {limit:.10g}' for word, limit in limits if limit is not None)
        if self.low is not None and self.high is not None:
            limits_text = f'from {self.low:.10g} to {self.high:.10g}'
        article, what = ('an', 'integer') if self.kind is int else ('a', 'finite number')
        if self.count:
            counts = ' or '.join(str(count) for count in self.count) + ' ' if self.count != ANY_COUNT else ''
            return f'{counts}{what}s {limits_text}'.rstrip()
        return f'{article} {what} {limits_text}'.rstrip()

    def parse(self, text: Any, where: str) -> Any:
        """Converts what the command line gives: text, a list of texts, or the default of a flag.

        Raises:
            ValueError: If it is not a value of this argument.
        """
        if self.kind is dict:
            return _pairs(text, where)
        if self.count:
            values = text if isinstance(text, list) else text.strip('()[] ').replace(',', ' ').split()
            return self.check([self._number(value) for value in values], where)
        if isinstance(text, str):
            return self.check(self._number(text), where)
        return self.check(text, where)

    def _number(self, text: str) -> Any:
        # What is not a number stays text, which `check` refuses.
        if self.kind is bool:
            return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}.get(text.lower(), text)
        if self.kind is str:
            return text
        try:
            return self.kind(text)
        except ValueError:
            return text

    def check(self, value: Any, where: str) -> Any:
        """Checks a typed value, such as YAML gives.

        Args:
            value: The value; None stands for the default if that is None.
            where: What an error calls the argument.

        Returns:
            The value; integers as floats where those are asked for.

        Raises:
            ValueError: If it is not a value of this argument.
        """
        if value is None and (self.default is None or self.optional):
            return None
        if self.count:
            if not isinstance(value, list | tuple) or (self.count != ANY_COUNT and len(value) not in self.count):
                raise self._error(value, where)
            if not value:
                raise self._error(value, where)
            return [self._one(item, value, where) for item in value]
        return self._one(value, value, where)

    def _one(self, item: Any, value: Any, where: str) -> Any:
        kind: Any = self.kind
        if self.any_case and isinstance(item, str):
            item = item.lower()
        if self.kind is float and isinstance(item, str):
            # YAML takes 4e-5 for text.
            item = self._number(item)
        if self.kind is float and isinstance(item, int) and not isinstance(item, bool) and abs(item) < 2**53:
            item = float(item)
        if type(item) is not kind or not self._in_range(item):
            raise self._error(value, where)
        if kind is str and '\0' in item:
            raise ValueError(f'{where} has a null character, expected {self.expected}.')
        if kind is str and any('\ud800' <= character <= '\udfff' for character in item):
            # Bytes of a file's name that are not UTF-8. The config that the run writes could not be read with them.
            raise ValueError(f'{where} is {item!a}, expected UTF-8: rename the file or folder.')
        if kind is dict and not all(isinstance(key, str) for key in item):
            raise self._error(value, where)
        return item

    def _in_range(self, item: Any) -> bool:
        if self.choices:
            return item in self.choices
        if self.kind not in (int, float):
            return True
        if self.kind is int and abs(item) > _LARGEST_INT:
            return False
        return (
            math.isfinite(item)
            and (self.low is None or item >= self.low)
            and (self.above is None or item > self.above)
            and (self.high is None or item <= self.high)
            and (self.below is None or item < self.below)
        )

    def _error(self, value: Any, where: str) -> ValueError:
        found = repr(value)
        return ValueError(f'{where} is {found if len(found) < 80 else found[:77] + "..."}, expected {self.expected}.')


def _pairs(texts: Sequence[str] | dict[str, Any], where: str) -> dict[str, Any]:
    if isinstance(texts, dict):
        return texts
    pairs: dict[str, Any] = {}
    for text in texts:
        key, separator, value = text.partition('=')
        if not separator or not key:
            raise ValueError(f"{where} has '{text}', expected K=V, such as {where} name=value.")
        if key in pairs:
            raise ValueError(f"{where} gives '{key}' twice, expected it once.")
        try:
            pairs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pairs[key] = value
    return pairs
