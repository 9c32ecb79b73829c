"""What has become of workers and adapters, a line each: in the controller's log, and for whoever started the fleet."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque

logger = logging.getLogger(__name__)

_MAX_KEPT = 1000
_WAIT_S = 1.0  # an answer is a sign of life too


class Events:
    """Numbered from 1; by a restarted controller, whose lines are all new to who has read an earlier one's, from a
    higher number."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=_MAX_KEPT)
        self._added = asyncio.Event()  # set, and replaced, with each line
        self.last = 0

    def number_from(self, number: int) -> None:
        """Before the first line."""
        self.last = number

    def add(self, line: str, level: int = logging.INFO) -> None:
        """Something has happened."""
        logger.log(level, line)
        self.last += 1
        self._lines.append((self.last, line))
        self._added.set()
        self._added = asyncio.Event()

    async def after(self, number: int) -> list[tuple[int, str]]:
        """Those that came after the one with this number, all after one that is not known; waits for a second."""
        if number > self.last:
            number = 0
        if number == self.last:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WAIT_S):
                    await self._added.wait()
        return [(known, line) for known, line in self._lines if known > number]
