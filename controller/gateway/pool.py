"""The sessions with all workers of the routing table.

Owns: that there is one session for each worker of the table, and putting a request on the one that the router chooses.
Leaves to others: the choice (router.py), a session's life (session.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence

from lorafleet.controller.gateway.config import SessionTimes
from lorafleet.controller.gateway.router import WorkerView, choose_worker
from lorafleet.controller.gateway.routing_table import Endpoint
from lorafleet.controller.gateway.session import WorkerSession
from lorafleet.workers.errors import WorkerUnavailableError

logger = logging.getLogger(__name__)

_SWEEP_S = 0.5


class WorkerPool:
    """Sessions by worker identity. A worker that leaves the table gets nothing new; its session ends with its work."""

    def __init__(self, *, gateway_id: str, token: str, times: SessionTimes) -> None:
        self._gateway_id = gateway_id
        self._token = token
        self._times = times
        self._sessions: dict[tuple[str, int, str], WorkerSession] = {}
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def sessions(self) -> Iterable[WorkerSession]:
        """All, retired ones included."""
        return self._sessions.values()

    def apply(self, endpoints: Iterable[Endpoint]) -> None:
        """Make the sessions those of a new table."""
        wanted = {endpoint.identity: endpoint for endpoint in endpoints}
        for identity, session in self._sessions.items():
            session.retired = identity not in wanted
            session.endpoint = wanted.get(identity, session.endpoint)
        for identity, endpoint in wanted.items():
            if identity not in self._sessions:
                session = WorkerSession(endpoint, gateway_id=self._gateway_id, token=self._token, times=self._times)
                self._sessions[identity] = session
                session.start()
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep(), name="session sweeper")

    def views(self) -> list[WorkerView]:
        """What is known of each worker in the table."""
        return [session.view() for session in self._sessions.values() if not session.retired]

    @property
    def has_ready_worker(self) -> bool:
        return any(view.ready for view in self.views())

    def choose(self, adapters: Sequence[str]) -> WorkerSession:
        """The session for a request. adapters: digests; none for the base model. Raises WorkerUnavailableError."""
        views = {session.view(): session for session in self._sessions.values() if not session.retired}
        chosen = choose_worker(list(views), adapters)
        if chosen is None:
            if adapters and any(view.ready for view in views):
                raise WorkerUnavailableError(
                    f"No worker that is ready has slots for {len(adapters)} adapters. Name fewer, or raise --max-loras."
                    if len(adapters) > 1
                    else "No worker takes adapters now; they were started without LoRA."
                )
            raise WorkerUnavailableError("No worker can take the request now. Try again in a moment.")
        return views[chosen]

    async def close(self) -> None:
        """End all sessions."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
            self._sweeper = None
        sessions, self._sessions = self._sessions, {}
        await asyncio.gather(*(session.close() for session in sessions.values()))

    async def _sweep(self) -> None:
        """End sessions that are retired and idle."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            for identity, session in list(self._sessions.items()):
                if session.retired and not session.num_streams:
                    del self._sessions[identity]
                    logger.info("worker %s left the routing table", session.endpoint.worker_id)
                    await session.close()
