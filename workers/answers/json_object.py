"""One JSON object, read as it comes, a member at a time.

Owns: where members begin and end, and JSON's rules, except that strings may hold raw control characters, as models
write them. Leaves to others: what the members mean (json_call.py).
"""

from __future__ import annotations

import json
import re
from enum import Enum, auto
from typing import Final, NamedTuple

MAX_DEPTH: Final = 64
_MAX_SCALAR_CHARS = 64  # of a number or a literal

_PLAIN = re.compile(r'[^"\\]*')
_SPACE = re.compile(r"[ \t\n\r]*")
_SCALAR_CHARS = re.compile(r"[-+.0-9A-Za-z]*")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_CLOSING = {"{": "}", "[": "]"}


class Event(Enum):
    """What has been read."""

    KEY = auto()  # a member's name; its text is decoded
    TEXT = auto()  # more of the member's value, as written
    END = auto()  # of the member's value
    DONE = auto()  # the object is complete
    BROKEN = auto()  # the next character cannot stand there


class Read(NamedTuple):
    """An event and its text."""

    event: Event
    text: str = ""


class _Expect(Enum):
    VALUE = auto()
    FIRST_VALUE = auto()  # or the end of the list
    KEY = auto()
    FIRST_KEY = auto()  # or the end of the object
    COLON = auto()
    AFTER = auto()  # a comma or an end


_VALUES = (_Expect.VALUE, _Expect.FIRST_VALUE)
_KEYS = (_Expect.KEY, _Expect.FIRST_KEY)


class _In(Enum):
    NOTHING = auto()
    STRING = auto()
    ESCAPE = auto()
    SCALAR = auto()


class JsonObject:
    """Reads from the object's opening brace. After DONE or BROKEN it reads no more."""

    __slots__ = ("_ended", "_expect", "_in", "_in_member", "_is_key", "_key", "_name", "_outcome", "_scalar", "_stack")

    def __init__(self) -> None:
        self._stack: list[str] = []  # the closing brackets to come
        self._expect = _Expect.VALUE
        self._in = _In.NOTHING
        self._is_key = False  # of a string
        self._key: list[str] = []  # the text of a member's name, as written
        self._name: str | None = None  # of a member, of which KEY is still to be told
        self._scalar = ""
        self._in_member = False  # in a member's value
        self._ended = False  # a member's value, of which END is still to be told
        self._outcome: Event | None = None

    @property
    def has_event(self) -> bool:
        """Return whether there is an event that needs no more text."""
        return self._ended

    def read(self, text: str, position: int) -> tuple[Read | None, int]:
        """Read up to the next event, or to the end of `text` (None). Return the position after it too."""
        if self._ended:
            self._ended = False
            return Read(Event.END), position
        begin, was_in_member = position, self._in_member
        while position < len(text) and self._outcome is None:
            start = position
            position = self._advance(text, position)
            if self._in_member and not was_in_member:
                begin, was_in_member = start, True
            elif was_in_member and not self._in_member:
                self._ended = True
                return Read(Event.TEXT, text[begin:position]), position
            elif self._name is not None:
                name, self._name = self._name, None
                return Read(Event.KEY, name), position
        if was_in_member and position > begin:
            return Read(Event.TEXT, text[begin:position]), position
        return (None if self._outcome is None else Read(self._outcome)), position

    def _advance(self, text: str, position: int) -> int:
        """Read one token, or the part of it that is there. Return the position after it."""
        if self._in is _In.ESCAPE:
            self._in = _In.STRING
            return self._string_text(text, position, position + 1)
        if self._in is _In.STRING:
            return self._string(text, position)
        if self._in is _In.SCALAR:
            return self._more_of_scalar(text, position)
        end = _SPACE.match(text, position).end()  # type: ignore[union-attr]  # matches anything
        return end if end > position else self._token(text, position)

    def _string(self, text: str, position: int) -> int:
        end = _PLAIN.match(text, position).end()  # type: ignore[union-attr]  # matches anything
        if end == len(text):
            return self._string_text(text, position, end)
        if text[end] == "\\":
            self._in = _In.ESCAPE
            return self._string_text(text, position, end + 1)
        end = self._string_text(text, position, end + 1)
        self._in = _In.NOTHING
        if not self._is_key:
            self._value_ended()
            return end
        self._is_key = False
        self._expect = _Expect.COLON
        if self._key:
            try:
                self._name, self._key = json.loads("".join(self._key), strict=False), []
            except ValueError:  # an unknown escape
                self._outcome = Event.BROKEN
        return end

    def _string_text(self, text: str, position: int, end: int) -> int:
        if self._is_key and len(self._stack) == 1:
            self._key.append(text[position:end])
        return end

    def _more_of_scalar(self, text: str, position: int) -> int:
        room = _MAX_SCALAR_CHARS + 1 - len(self._scalar)
        end = _SCALAR_CHARS.match(text, position, position + room).end()  # type: ignore[union-attr]
        self._scalar += text[position:end]
        if len(self._scalar) > _MAX_SCALAR_CHARS:
            self._outcome = Event.BROKEN
        elif end < len(text):
            self._in = _In.NOTHING
            if _SCALAR.fullmatch(self._scalar):
                self._value_ended()
            else:
                self._outcome = Event.BROKEN
        return end

    def _token(self, text: str, position: int) -> int:
        """Read a bracket, comma or colon, or begin a string or a scalar."""
        char, expect = text[position], self._expect
        if expect in _VALUES and (char in '{["' or _SCALAR_CHARS.match(char).end()):  # type: ignore[union-attr]
            self._in_member = self._in_member or len(self._stack) == 1
            if char == '"':
                self._in = _In.STRING
            elif char in _CLOSING:
                self._stack.append(_CLOSING[char])
                self._expect = _Expect.FIRST_KEY if char == "{" else _Expect.FIRST_VALUE
                if len(self._stack) > MAX_DEPTH:
                    self._outcome = Event.BROKEN
            else:
                self._in, self._scalar = _In.SCALAR, ""
                return position
        elif char == '"' and expect in _KEYS:
            self._in, self._is_key = _In.STRING, True
            return self._string_text(text, position, position + 1)
        elif char == ":" and expect is _Expect.COLON:
            self._expect = _Expect.VALUE
        elif char == "," and expect is _Expect.AFTER:
            self._expect = _Expect.KEY if self._stack[-1] == "}" else _Expect.VALUE
        elif char == self._stack[-1] and (
            expect is _Expect.AFTER or expect is (_Expect.FIRST_KEY if char == "}" else _Expect.FIRST_VALUE)
        ):
            self._stack.pop()
            self._value_ended()
            if not self._stack:
                self._outcome = Event.DONE
        else:
            self._outcome = Event.BROKEN
            return position
        return position + 1

    def _value_ended(self) -> None:
        self._expect = _Expect.AFTER
        if len(self._stack) == 1:
            self._in_member = False
