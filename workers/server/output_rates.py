"""Tokens a second of each adapter, from its counts at successive looks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

WINDOW_S: Final = 5.0


class OutputRates:
    """Means over the last seconds, or since the previous look if that is longer ago."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looks: deque[tuple[float, Mapping[str, int]]] = deque()

    def look(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Return the rates up to now; none the first time. A count that fell has restarted."""
        now = self._clock()
        while len(self._looks) > 1 and now - self._looks[1][0] >= WINDOW_S:
            self._looks.popleft()
        self._looks.append((now, counts))
        began, before = self._looks[0]
        if now <= began:
            return {}
        return {name: max(0, count - before.get(name, 0)) / (now - began) for name, count in counts.items()}
