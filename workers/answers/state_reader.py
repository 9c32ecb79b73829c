"""Reading text that comes in pieces, one state after the other."""

from __future__ import annotations

from collections.abc import Callable

from lorafleet.workers.answers.parts import Part


class StateReader:
    """The text that is not read yet, and the state that reads on. States append to `_parts` and move `_position`."""

    def __init__(self, first: Callable[[], bool]) -> None:
        """first: the first state; a state returns False if it needs more text."""
        self._text = ""  # not yet read, only as much as could be a part of a mark
        self._position = 0
        self._is_last = False  # no more text comes
        self._parts: list[Part] = []
        self._state = first

    def push(self, text: str) -> list[Part]:
        """Read more text; return the parts that are certain."""
        self._text += text
        while self._position < len(self._text) and self._state():
            pass
        self._text, self._position = self._text[self._position :], 0
        parts, self._parts = self._parts, []
        return parts
