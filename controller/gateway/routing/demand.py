"""The demand for each adapter: a fading count of its requests in the last seconds."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

FADE_S = 1.0  # the age at which a request counts 1/e
_FORGET_S = 20.0  # the age at which it counts nothing


class Demand:
    """The counts, by adapter or any other key."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()  # → (count, when); the oldest first

    def book(self, what: Hashable) -> float:
        """Count one more request. Return the number of recent ones before it."""
        now = self._clock()
        count, at = self._counts.pop(what, (0.0, now))
        recent = count * math.exp((at - now) / FADE_S)
        self._counts[what] = (recent + 1.0, now)
        while self._counts:
            oldest = next(iter(self._counts))
            if now - self._counts[oldest][1] <= _FORGET_S:
                break
            del self._counts[oldest]
        return recent
