"""The text of GET /metrics: rendered on a thread from a snapshot, and rarely enough to stay cheap.

Owns: the snapshot, one rendering at a time. Leaves to others: the numbers and their names (instruments.py, workers.py,
vllm.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from lorafleet.controller.gateway.metrics.instruments import Metrics
from lorafleet.controller.gateway.routing.routing_table import RoutingTable
from lorafleet.controller.gateway.routing.worker_view import WorkerView

_CHEAP_S: Final = 0.05  # processor time; a page that costs less is rendered for every request
_SHARE: Final = 10  # dearer pages are reused so that rendering takes at most this fraction of the time


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state that collectors read while the event loop runs on."""

    views: Sequence[WorkerView] = ()
    table: RoutingTable | None = None
    adapters_in_use: Sequence[str] = ()  # names of adapters that this gateway's requests use or wait for


class MetricsPage:
    """The page; `get` may be called at any rate."""

    def __init__(
        self,
        metrics: Metrics,
        take_snapshot: Callable[[], Snapshot],
        clock: Callable[[], float] = time.monotonic,
        cost_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """take_snapshot: called on the event loop. cost_clock: processor seconds, called on the thread."""
        self.snapshot = Snapshot()  # for collectors
        self._metrics = metrics
        self._take_snapshot = take_snapshot
        self._clock = clock
        self._cost_clock = cost_clock
        self._page: asyncio.Task[bytes] | None = None
        self._good_until = 0.0

    async def get(self) -> bytes:
        """Return the page in Prometheus' text format."""
        if self._page is None or (self._page.done() and self._clock() >= self._good_until):
            self._page = asyncio.create_task(self._render(), name="metrics page")
        return await asyncio.shield(self._page)

    async def close(self) -> None:
        """Wait for a rendering in progress."""
        if self._page is not None:
            await asyncio.gather(self._page, return_exceptions=True)

    async def _render(self) -> bytes:
        self.snapshot = self._take_snapshot()
        page, cost_s = await asyncio.to_thread(self._timed)
        if cost_s >= _CHEAP_S:
            self._good_until = self._clock() + _SHARE * cost_s
        return page

    def _timed(self) -> tuple[bytes, float]:
        began = self._cost_clock()
        return self._metrics.render(), self._cost_clock() - began
