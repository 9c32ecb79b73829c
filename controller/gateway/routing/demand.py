"""How often adapters are asked for: a count of each one's requests that fades, so that it is of the last seconds."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

FADE_S = 1.0  # after which a request counts for 1/e
_FORGET_S = 20.0  # after which it counts for nothing


class Demand:
    """By adapter, or whatever is asked for."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()  # → (count, when); longest ago first

    def book(self, what: Hashable) -> float:
        """One more request; how many there were of late, this one left out."""
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
