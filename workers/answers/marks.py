"""Marks in a text that comes in pieces."""

from __future__ import annotations

import re
from collections.abc import Sequence


class Marks:
    """Some marks, none of which begins with another."""

    def __init__(self, marks: Sequence[str]) -> None:
        self._marks = tuple(marks)
        self._any = re.compile("|".join(map(re.escape, marks)) or r"(?!)")
        self._max_chars = max(map(len, marks), default=1)

    def find(self, text: str, position: int = 0) -> re.Match[str] | None:
        """Return the first mark at or after a position."""
        return self._any.search(text, position)

    def at(self, text: str, position: int) -> re.Match[str] | None:
        """Return the mark at a position."""
        return self._any.match(text, position)

    def num_begun(self, text: str, position: int = 0) -> int:
        """Return the length of the text's end that may be the beginning of a mark."""
        longest = min(self._max_chars - 1, len(text) - position)
        return next((size for size in range(longest, 0, -1) if self._begins(text[len(text) - size :])), 0)

    def _begins(self, text: str) -> bool:
        return any(mark.startswith(text) for mark in self._marks)
