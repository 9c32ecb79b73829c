"""Adapters in use by one worker's requests.

A request whose session was cut may resume after its last token, here or on another worker. So its adapters count as
used for a while. Pure; the clock is injected.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

MAX_CUT = 10_000  # remembered adapters of cut requests


class AdapterUse:
    """Counts requests per adapter. Each request that `begin`s must be `end`ed or `cut`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._digests: dict[str, Sequence[str]] = {}  # by request
        self._num_requests: Counter[str] = Counter()
        self._cut_at: dict[str, float] = {}  # by digest, oldest first

    def begin(self, request_id: str, digests: Sequence[str]) -> None:
        if digests:
            self._digests[request_id] = digests
            self._num_requests.update(digests)

    def end(self, request_id: str) -> None:
        """Remove a finished request."""
        self._forget(request_id)

    def cut(self, request_id: str) -> None:
        """Remove a request that may resume elsewhere."""
        for digest in self._forget(request_id):
            self._cut_at.pop(digest, None)
            self._cut_at[digest] = self._clock()
        while len(self._cut_at) > MAX_CUT:
            del self._cut_at[next(iter(self._cut_at))]

    def used(self, digests: Iterable[str], cut_s: float) -> list[str]:
        """Return those of `digests` used by a request now, or by one cut in the last `cut_s` seconds."""
        since = self._clock() - cut_s
        return [
            digest for digest in digests if digest in self._num_requests or self._cut_at.get(digest, -math.inf) >= since
        ]

    def _forget(self, request_id: str) -> Sequence[str]:
        digests = self._digests.pop(request_id, ())
        for digest in digests:
            self._num_requests[digest] -= 1
            if not self._num_requests[digest]:
                del self._num_requests[digest]
        return digests
