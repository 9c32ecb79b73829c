"""Calls that are written as Python's: ``[get_weather(city="Paris", days=3), now()]``.

Llama 3.2 and 4 write them, and Gemma, in a fence. Only an answer that begins with a call of a known tool has any.

Owns: where calls begin and end. Leaves to others: the values of their arguments (python_literal.py).

A call is told when it is complete, its arguments converted to JSON; one whose arguments are not literals is content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container
from typing import Final

from lorafleet.workers.answers.parts import CallArguments, CallStart, Content, Part
from lorafleet.workers.answers.python_literal import LiteralReader
from lorafleet.workers.answers.state_reader import StateReader

MAX_CALL_CHARS: Final = 1 << 16  # some 30 ms of the event loop
_MAX_HEAD_CHARS = 512  # up to the parenthesis
_OPENINGS = ("<|python_tag|>", "```tool_code\n", "```python\n")
_OPENING = rf"\s*(?:{'|'.join(map(re.escape, _OPENINGS))})?\s*\[?\s*"
_NAME = r"[A-Za-z_][\w.-]*"
_FIRST, _FIRST_SO_FAR = re.compile(rf"{_OPENING}({_NAME})\("), re.compile(rf"{_OPENING}(?:{_NAME})?")
_NEXT, _NEXT_SO_FAR = re.compile(rf"[\s,;]*({_NAME})\("), re.compile(rf"[\s,;]*(?:{_NAME})?")
_CLOSING, _CLOSING_SO_FAR = re.compile(r"\s*\]?\s*(?:```)?"), re.compile(r"\s*\]?\s*`{0,2}")
_STRUCTURE = re.compile(r"[()\[\]{}'\"]")
_QUOTED = {quote: re.compile(rf"[^{quote}\\]*") for quote in "'\""}
_CLOSINGS = {"(": ")", "[": "]", "{": "}"}


class PythonicCalls(StateReader):
    """Reads one answer."""

    def __init__(self, tools: Container[str]) -> None:
        """tools: names of functions that may be called."""
        super().__init__(self._first)
        self._tools = tools
        self._raw: list[str] = []  # of what may become a call
        self._num_raw_chars = 0  # of a call's arguments
        self._name = ""
        self._arguments: list[str] = []
        self._stack: list[str] = []  # the closing brackets to come
        self._quote = ""
        self._is_escape = False
        self._after_call = False

    def finish(self) -> list[Part]:
        """End the text; return the parts held back."""
        self._is_last = True
        parts = self.push("")
        if self._raw:
            self._reject()
        parts += self._parts
        self._parts = []
        return parts

    def _first(self) -> bool:
        return self._head(_FIRST, _FIRST_SO_FAR, self._content)

    def _following(self) -> bool:
        return self._head(_NEXT, _NEXT_SO_FAR, self._closing)

    def _head(self, whole: re.Pattern[str], so_far: re.Pattern[str], otherwise: Callable[[], bool]) -> bool:
        """Read up to a call's arguments. otherwise: the state if there is no call."""
        head = self._text[self._position : self._position + _MAX_HEAD_CHARS]
        found = whole.match(head)
        if found is not None and found[1] in self._tools:
            self._name = found[1]
            self._raw.append(self._upto(self._position + found.end()))
            self._num_raw_chars = 0
            self._state = self._in_arguments
            return True
        may_come = so_far.fullmatch(head) or any(opening.startswith(head.lstrip()) for opening in _OPENINGS)
        if found is None and may_come and len(head) < _MAX_HEAD_CHARS and not self._is_last:
            return False
        self._state = otherwise
        return True

    def _in_arguments(self) -> bool:
        """Read up to the call's closing parenthesis."""
        room = MAX_CALL_CHARS - self._num_raw_chars
        stop = min(len(self._text), self._position + room)
        end, is_whole, is_broken = self._position, False, not room
        while end < stop and not is_whole:
            after = self._structure(end, stop)
            if after is None:
                is_broken = True
                break
            end, is_whole = after
        self._take_arguments(end - is_whole)
        if is_whole:
            self._raw.append(self._upto(end))
            self._end_call()
        elif is_broken:
            self._reject()
        return is_whole or is_broken or self._num_raw_chars == MAX_CALL_CHARS

    def _take_arguments(self, end: int) -> None:
        piece = self._upto(end)
        self._arguments.append(piece)
        self._raw.append(piece)
        self._num_raw_chars += len(piece)

    def _structure(self, position: int, stop: int) -> tuple[int, bool] | None:
        """Read up to a bracket or quote and past it; return whether it ends the call. None: it cannot stand there."""
        if self._is_escape:
            self._is_escape = False
            return position + 1, False
        if self._quote:
            found = _QUOTED[self._quote].match(self._text, position, stop)
            assert found is not None
            if found.end() == stop:
                return stop, False
            self._is_escape = self._text[found.end()] == "\\"
            self._quote = self._quote if self._is_escape else ""
            return found.end() + 1, False
        found = _STRUCTURE.search(self._text, position, stop)
        if found is None:
            return stop, False
        char = found.group()
        if char in "'\"":
            self._quote = char
        elif char in _CLOSINGS:
            self._stack.append(_CLOSINGS[char])
        elif self._stack:
            if self._stack.pop() != char:
                return None
        else:
            return (found.end(), True) if char == ")" else None
        return found.end(), False

    def _end_call(self) -> None:
        try:
            values = LiteralReader("".join(self._arguments)).keywords()
        except ValueError:
            self._reject()
            return
        self._parts += (CallStart(self._name), CallArguments(json.dumps(values, ensure_ascii=False)))
        self._raw, self._arguments, self._after_call = [], [], True
        self._state = self._following

    def _closing(self) -> bool:
        """Read what closes the list of calls."""
        rest = self._text[self._position : self._position + _MAX_HEAD_CHARS]
        if _CLOSING_SO_FAR.fullmatch(rest) and len(rest) < _MAX_HEAD_CHARS and not self._is_last:
            return False
        found = _CLOSING.match(rest)
        assert found is not None
        self._position += found.end()
        self._state = self._content
        return True

    def _content(self) -> bool:
        """Read the rest."""
        self._show(self._upto(len(self._text)))
        return False

    def _reject(self) -> None:
        """Make what looked like a call content."""
        self._show("".join(self._raw))
        self._raw, self._arguments, self._state = [], [], self._content

    def _show(self, text: str) -> None:
        if self._after_call:
            text = text.lstrip()
        if text:
            self._after_call = False
            self._parts.append(Content(text))

    def _upto(self, end: int) -> str:
        text, self._position = self._text[self._position : end], end
        return text
