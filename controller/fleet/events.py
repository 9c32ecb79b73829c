"""The fleet's events, a line each: in the controller's log, and for the command that started the fleet."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque

logger = logging.getLogger(__name__)

_MAX_KEPT = 1000
_WAIT_S = 1.0  # short, since an empty answer shows that the controller is alive


class Events:
    """The newest lines, numbered from 1; a restarted controller starts higher, so its lines are new to all readers."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=_MAX_KEPT)
        self._added = asyncio.Event()  # set, and replaced, with each line
        self.last = 0

    def number_from(self, number: int) -> None:
        """Set the number that the first line comes after."""
        self.last = number

    def add(self, line: str, level: int = logging.INFO) -> None:
        """Add and log a line."""
        logger.log(level, line)
        self.last += 1
        self._lines.append((self.last, line))
        self._added.set()
        self._added = asyncio.Event()

    async def after(self, number: int) -> list[tuple[int, str]]:
        """Return the events after `number`, or all if it is unknown; wait up to 1 s for the first."""
        if number > self.last:
            number = 0
        if number == self.last:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WAIT_S):
                    await self._added.wait()
        return [(known, line) for known, line in self._lines if known > number]
