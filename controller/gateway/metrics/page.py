"""GET /metrics' text: rendered on a thread, from what was so at one moment, and not more often than it is worth.

Owns: that moment's copy, one rendering at a time. Leaves to others: the numbers and their names (instruments.py,
workers.py, vllm.py).
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

_CHEAP_S: Final = 0.05  # of a processor: a page that costs less is never old
_SHARE: Final = 10  # of all time at most a tenth goes into pages that cost more


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What collectors may look at while the event loop goes on."""

    views: Sequence[WorkerView] = ()
    table: RoutingTable | None = None
    adapters_in_use: Sequence[str] = ()  # names of adapters that requests of this gateway run with or wait for


class MetricsPage:
    """`get` it as often as you like."""

    def __init__(
        self,
        metrics: Metrics,
        take_snapshot: Callable[[], Snapshot],
        clock: Callable[[], float] = time.monotonic,
        cost_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """take_snapshot: called on the event loop. cost_clock: seconds of a processor, called on the thread."""
        self.snapshot = Snapshot()  # for collectors
        self._metrics = metrics
        self._take_snapshot = take_snapshot
        self._clock = clock
        self._cost_clock = cost_clock
        self._page: asyncio.Task[bytes] | None = None
        self._good_until = 0.0

    async def get(self) -> bytes:
        """Prometheus' text format."""
        if self._page is None or (self._page.done() and self._clock() >= self._good_until):
            self._page = asyncio.create_task(self._render(), name="metrics page")
        return await asyncio.shield(self._page)

    async def close(self) -> None:
        """Wait for what is being rendered."""
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
