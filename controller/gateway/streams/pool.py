"""The sessions with all workers of the routing table.

Owns: one session for each worker of the table, and the booking of a request on the one the router chooses. Leaves to
others: the choice (routing/router.py), a session's life (session.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence

from lorafleet.controller.gateway.config import SessionTimes
from lorafleet.controller.gateway.routing.demand import Demand
from lorafleet.controller.gateway.routing.prefix_memory import prefix_hashes
from lorafleet.controller.gateway.routing.router import Wanted, choose_worker
from lorafleet.controller.gateway.routing.routing_table import Endpoint
from lorafleet.controller.gateway.routing.worker_view import WorkerView
from lorafleet.controller.gateway.streams.session import WorkerSession
from lorafleet.controller.gateway.streams.waiting_line import WaitingLine
from lorafleet.workers.errors import (
    AdapterUnavailableError,
    InvalidRequestError,
    LoRAFleetError,
    WorkerUnavailableError,
)
from lorafleet.workers.scheduling.request import GenerateRequest

logger = logging.getLogger(__name__)

_SWEEP_S = 0.5
_SURE_S = 2.0  # after a new table, by when heartbeats have told which adapters each worker has


class WorkerPool:
    """Sessions by worker identity. The session of a worker that leaves the table ends after its last request."""

    def __init__(self, *, gateway_id: str, token: str, times: SessionTimes) -> None:
        self._gateway_id = gateway_id
        self._token = token
        self._times = times
        self._sessions: dict[tuple[str, int, str], WorkerSession] = {}
        self._demand = Demand()
        self.line = WaitingLine()  # of requests that no worker could take
        self._sweeper: asyncio.Task[None] | None = None
        self._applied_at = time.monotonic()  # time of the last table

    @property
    def sessions(self) -> Iterable[WorkerSession]:
        """Return all sessions, including retired ones."""
        return self._sessions.values()

    def apply(self, endpoints: Iterable[Endpoint]) -> None:
        """Start and retire sessions to match a new table."""
        self._applied_at = time.monotonic()
        wanted = {endpoint.identity: endpoint for endpoint in endpoints}
        for identity, session in self._sessions.items():
            session.retired = identity not in wanted
            session.endpoint = wanted.get(identity, session.endpoint)
        for identity, endpoint in wanted.items():
            if identity not in self._sessions:
                session = WorkerSession(
                    endpoint,
                    gateway_id=self._gateway_id,
                    token=self._token,
                    times=self._times,
                    on_open=self.line.move,
                )
                self._sessions[identity] = session
                session.start()
        self.line.move()
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep(), name="session sweeper")

    def views(self) -> list[WorkerView]:
        """Return the view of each worker in the table."""
        return [session.view() for session in self._sessions.values() if not session.retired]

    @property
    def has_ready_worker(self) -> bool:
        return any(view.ready for view in self.views())

    @property
    def num_seats(self) -> int:
        """Return the seats of all workers that take requests."""
        return sum(view.max_num_seqs for view in self.views() if view.ready)

    def choose(self, request: GenerateRequest) -> WorkerSession:
        """Choose the session for a request, which the caller then submits there.

        Raises WorkerUnavailableError if no worker can take it now, AdapterUnavailableError if all have failed to load
        an adapter again, InvalidRequestError if none could take it even if all were ready.
        """
        adapters, prompt = request.digests, request.prompt_token_ids
        sessions = _with_adapters([session for session in self._sessions.values() if not session.retired], adapters)
        views = [session.view() for session in sessions]
        if adapters and time.monotonic() - self._applied_at > _SURE_S:
            # The table does not list retired versions, which a restarted worker may not have.
            having = [number for number, view in enumerate(views) if all(map(view.tier, adapters))]
            if having:
                sessions, views = [sessions[number] for number in having], [views[number] for number in having]
        if not any(view.ready and view.max_loras >= len(adapters) for view in views):
            raise self._refusal(views, len(adapters))
        owner = (request.tenant, request.cache_salt or "", request.model_key or "")
        hashes = prefix_hashes("\0".join(owner), prompt)
        cached = {session.endpoint.worker_id: session.num_cached_tokens(hashes) for session in sessions}
        num_recent = self._demand.book(adapters) * max(session.num_gateways for session in sessions)
        wanted = Wanted(adapters, len(prompt), num_recent, cached)
        chosen = choose_worker(views, wanted, lot=self._gateway_id)
        assert chosen is not None
        session = sessions[views.index(chosen)]
        session.expect(adapters, len(prompt) - cached[chosen.worker_id], hashes)
        return session

    @staticmethod
    def _refusal(views: Sequence[WorkerView], num_adapters: int) -> LoRAFleetError:
        if views and all(view.max_loras < num_adapters for view in views):
            return InvalidRequestError(
                f"No worker has slots for {num_adapters} adapters at once. Name fewer, or start with a larger "
                "--max-loras."
                if num_adapters > 1
                else "The workers serve no adapters; start them with --enable-lora.",
                param="model",
            )
        return WorkerUnavailableError("No worker can take the request now. Try again in a moment.")

    async def close(self) -> None:
        """End all sessions."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
            self._sweeper = None
        sessions, self._sessions = self._sessions, {}
        await asyncio.gather(*(session.close() for session in sessions.values()))

    async def _sweep(self) -> None:
        """Close sessions that are retired and idle."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            for identity, session in list(self._sessions.items()):
                if session.retired and not session.num_streams:
                    del self._sessions[identity]
                    logger.info("worker %s left the routing table", session.endpoint.worker_id)
                    await session.close()


def _with_adapters(sessions: list[WorkerSession], adapters: Sequence[str]) -> list[WorkerSession]:
    """Return the sessions whose workers have all of `adapters`. Raises AdapterUnavailableError if none will soon."""
    able = [session for session in sessions if session.endpoint.lacking.keys().isdisjoint(adapters)]
    if sessions and not able:
        reasons = [{session.endpoint.lacking.get(digest, "") for digest in adapters} - {""} for session in sessions]
        if all(reasons):
            raise AdapterUnavailableError(
                f"No worker has the adapter now, since it could not be loaded again: {min(map(min, reasons))}. The "
                "load is retried; meanwhile unload it, or load it in place from its new path. GET /fleet says more.",
                param="model",
            )
    return able
