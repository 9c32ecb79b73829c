"""Python literals in text that a model wrote, without Python's parser, which may take any time or memory for them.

Owns: dictionaries, lists, tuples, strings, numbers, constants; JSON's constants too. Leaves to others: calls
(pythonic_calls.py).
"""

from __future__ import annotations

import math
import re
from typing import Any, Final

MAX_DEPTH: Final = 64

_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:_[0-9]+)*)?(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?")
_INTEGER = re.compile(r"[-+]?[0-9_]{1,4000}")
_WORD = re.compile(r"[A-Za-z_]\w*")
_QUOTED = {quote: re.compile(rf"(?:[^{quote}\\]|\\.)*", re.DOTALL) for quote in "'\""}
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\\": "\\", "'": "'", '"': '"', "/": "/", "\n": ""}
_CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


class LiteralReader:
    """Reads literals from a text. Raises ValueError for what is none."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._depth = 0

    def keywords(self) -> dict[str, Any]:
        """Read the whole text as ``name=value`` pairs."""
        values: dict[str, Any] = {}
        while not self._is_at_end():
            word = _WORD.match(self._text, self._position)
            if word is None:
                raise ValueError("not a name")
            self._position = word.end()
            self._take("=")
            values[word.group()] = self.value()
            if not self._is_at_end():
                self._take(",")
        return values

    def value(self) -> Any:
        """Read one literal."""
        self._skip_space()
        char = self._text[self._position : self._position + 1]
        if char in ("'", '"'):
            return self._string(char)
        if char in ("[", "("):
            return self._list("]" if char == "[" else ")")
        if char == "{":
            return self._dictionary()
        word = _WORD.match(self._text, self._position)
        if word is not None:
            self._position = word.end()
            if word.group() not in _CONSTANTS:
                raise ValueError("not a constant")
            return _CONSTANTS[word.group()]
        return self._number()

    def _string(self, quote: str) -> str:
        start = self._position + 1
        found = _QUOTED[quote].match(self._text, start)
        assert found is not None
        self._position = found.end()
        self._take(quote)
        value = _ESCAPE.sub(_unescaped, found.group())
        value.encode()  # raises UnicodeEncodeError, a ValueError, for half a pair
        return value

    def _list(self, closing: str) -> list[Any]:
        self._enter()
        values: list[Any] = []
        while not self._closes(closing):
            values.append(self.value())
            if not self._closes(closing, stays=True):
                self._take(",")
        return values

    def _dictionary(self) -> dict[str, Any]:
        self._enter()
        values: dict[str, Any] = {}
        while not self._closes("}"):
            key = self.value()
            if not isinstance(key, str):
                raise ValueError("JSON's keys are strings")
            self._take(":")
            values[key] = self.value()
            if not self._closes("}", stays=True):
                self._take(",")
        return values

    def _number(self) -> int | float:
        found = _NUMBER.match(self._text, self._position)
        text = found.group() if found else ""
        self._position += len(text)
        value = int(text) if _INTEGER.fullmatch(text) else float(text)
        if not math.isfinite(value):
            raise ValueError("not a number of JSON")
        return value

    def _enter(self) -> None:
        self._position += 1
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError("too deep")

    def _closes(self, closing: str, *, stays: bool = False) -> bool:
        self._skip_space()
        if not self._text.startswith(closing, self._position):
            return False
        if not stays:
            self._position += 1
            self._depth -= 1
        return True

    def _take(self, char: str) -> None:
        self._skip_space()
        if not self._text.startswith(char, self._position):
            raise ValueError(f"no {char}")
        self._position += 1

    def _is_at_end(self) -> bool:
        self._skip_space()
        return self._position == len(self._text)

    def _skip_space(self) -> None:
        found = _SPACE.match(self._text, self._position)
        assert found is not None
        self._position = found.end()


def _unescaped(escape: re.Match[str]) -> str:
    code = escape[1]
    if len(code) > 1:
        return chr(int(code[1:], 16))
    return _ESCAPES.get(code, escape[0])
