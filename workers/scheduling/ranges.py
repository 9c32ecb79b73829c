"""Valid ranges of a caller's numbers: declared in a field's type, checked here.

`Annotated[int, Range(1, 16)]` is such a type; with `| None` it may be None. Owns: the check and its messages. Leaves to
others: each field's range (sampling_options.py, request.py, workers/params.py). Standard library only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from lorafleet.workers.errors import InvalidRequestError, quoted


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`."""

    low: float
    high: float
    is_open: bool = False  # excludes `low` itself


@dataclass(frozen=True, slots=True)
class Allowed:
    """The valid values of one field."""

    kind: type[Any]  # int, float (integers included) or bool
    within: Range | None  # for numbers
    may_be_none: bool

    def check(self, name: str, value: object) -> None:
        """Raises `InvalidRequestError`, which names the field, for an invalid value."""
        if value is None and self.may_be_none:
            return
        if self.kind is bool:
            if type(value) is not bool:
                raise InvalidRequestError(f"{name} is {quoted(value)}; it must be true or false.", param=name)
            return
        if type(value) is not int and (self.kind is int or type(value) is not float):
            what = "an integer" if self.kind is int else "a number"
            raise InvalidRequestError(f"{name} is {quoted(value)}; it must be {what}.", param=name)
        within = self.within
        assert within is not None and isinstance(value, int | float)
        if not within.low <= value <= within.high or (within.is_open and value == within.low):  # false for NaN too
            low, high = (str(end) if self.kind is int else f"{end:g}" for end in (within.low, within.high))
            bound = f"greater than {low} and at most {high}" if within.is_open else f"between {low} and {high}"
            raise InvalidRequestError(f"{name} is {quoted(value)}; it must be {bound}.", param=name)


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Raises `InvalidRequestError` unless `value` is an integer from `low` to `high`."""
    Allowed(int, Range(low, high), may_be_none=False).check(name, value)


def check_fields(fields: object) -> None:
    """Raises `InvalidRequestError` for the first field of a dataclass with an invalid value."""
    kind: Any = type(fields)
    read, rows = _table(kind)
    for value, row in zip(read(fields), rows, strict=True):
        name, usual, low, high, allowed = row
        if type(value) is not usual or not low <= value <= high:  # of another kind, maybe valid, or out of range
            allowed.check(name, value)


_Row = tuple[str, type[Any], float, float, Allowed]  # a field with its usual kind and bounds


@functools.cache
def _table(kind: Any) -> tuple[Callable[[object], tuple[Any, ...]], list[_Row]]:
    """Return a function that reads all fields of a dataclass with declared ranges, and a row for each."""
    rows: list[_Row] = []
    for name, allowed in allowed_of(kind).items():
        within = allowed.within or Range(False, True)
        low = math.nextafter(within.low, math.inf) if within.is_open else within.low
        rows.append((name, allowed.kind, low, within.high, allowed))
    return operator.attrgetter(*(name for name, *_ in rows)), rows


@functools.cache
def allowed_of(kind: type[Any]) -> Mapping[str, Allowed]:
    """Return the valid values of a dataclass's fields; fields whose type declares none are left out."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = ((entry.name, _allowed(hints[entry.name])) for entry in dataclasses.fields(kind))
    return {name: allowed for name, allowed in found if allowed is not None}


def _allowed(hint: Any) -> Allowed | None:
    may_be_none = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        parts = typing.get_args(hint)
        hint, may_be_none = parts[0], type(None) in parts
    if hint is bool:
        return Allowed(bool, None, may_be_none)
    if typing.get_origin(hint) is Annotated:
        base, *notes = typing.get_args(hint)
        within = next((note for note in notes if isinstance(note, Range)), None)
        return None if within is None else Allowed(base, within, may_be_none)
    return None
