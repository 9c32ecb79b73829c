"""The sessions with all workers of the routing table.

Owns: that there is one session for each worker of the table, and putting a request on the one that the router chooses.
Leaves to others: the choice (router.py), a session's life (session.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence

from lorafleet.controller.gateway.config import SessionTimes
from lorafleet.controller.gateway.demand import Demand
from lorafleet.controller.gateway.prefix_memory import prefix_names
from lorafleet.controller.gateway.router import Wanted, choose_worker
from lorafleet.controller.gateway.routing_table import Endpoint
from lorafleet.controller.gateway.session import WorkerSession
from lorafleet.controller.gateway.waiting_line import WaitingLine
from lorafleet.controller.gateway.worker_view import WorkerView
from lorafleet.workers.engine.request import GenerateRequest
from lorafleet.workers.errors import (
    AdapterUnavailableError,
    InvalidRequestError,
    LoRAFleetError,
    WorkerUnavailableError,
)

logger = logging.getLogger(__name__)

_SWEEP_S = 0.5
_SURE_S = 2.0  # after a table, workers' heartbeats have said which adapters they have


class WorkerPool:
    """Sessions by worker identity. A worker that leaves the table gets nothing new; its session ends with its work."""

    def __init__(self, *, gateway_id: str, token: str, times: SessionTimes) -> None:
        self._gateway_id = gateway_id
        self._token = token
        self._times = times
        self._sessions: dict[tuple[str, int, str], WorkerSession] = {}
        self._demand = Demand()
        self.line = WaitingLine()  # of those that no worker could take
        self._sweeper: asyncio.Task[None] | None = None
        self._applied_at = time.monotonic()  # of the last table

    @property
    def sessions(self) -> Iterable[WorkerSession]:
        """All, retired ones included."""
        return self._sessions.values()

    def apply(self, endpoints: Iterable[Endpoint]) -> None:
        """Make the sessions those of a new table."""
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
        """What is known of each worker in the table."""
        return [session.view() for session in self._sessions.values() if not session.retired]

    @property
    def has_ready_worker(self) -> bool:
        return any(view.ready for view in self.views())

    @property
    def num_seats(self) -> int:
        """Of all workers that take requests."""
        return sum(view.max_num_seqs for view in self.views() if view.ready)

    def choose(self, request: GenerateRequest) -> WorkerSession:
        """The session for a request, which is then to be submitted there.

        Raises WorkerUnavailableError when no worker can take it now, AdapterUnavailableError when all have tried in
        vain to load an adapter again, InvalidRequestError when none could even if all were ready.
        """
        adapters, prompt = request.digests, request.prompt_token_ids
        sessions = _with_adapters([session for session in self._sessions.values() if not session.retired], adapters)
        views = [session.view() for session in sessions]
        if adapters and time.monotonic() - self._applied_at > _SURE_S:
            # What no name stands for any more is not in the table: a worker that has restarted may not have it.
            having = [number for number, view in enumerate(views) if all(map(view.tier, adapters))]
            if having:
                sessions, views = [sessions[number] for number in having], [views[number] for number in having]
        if not any(view.ready and view.max_loras >= len(adapters) for view in views):
            raise self._refusal(views, len(adapters))
        owner = (request.tenant, request.cache_salt or "", request.model_key or "")
        names = prefix_names("\0".join(owner), prompt)
        cached = {session.endpoint.worker_id: session.num_cached_tokens(names) for session in sessions}
        num_recent = self._demand.book(adapters) * max(session.num_gateways for session in sessions)
        wanted = Wanted(adapters, len(prompt), num_recent, cached)
        chosen = choose_worker(views, wanted, lot=self._gateway_id)
        assert chosen is not None
        session = sessions[views.index(chosen)]
        session.expect(adapters, len(prompt) - cached[chosen.worker_id], names)
        return session

    @staticmethod
    def _refusal(views: Sequence[WorkerView], num_adapters: int) -> LoRAFleetError:
        if views and all(view.max_loras < num_adapters for view in views):
            return InvalidRequestError(
                f"No worker has slots for {num_adapters} adapters at once. Name fewer, or start with a larger "
                "--max-loras."
                if num_adapters > 1
                else "The workers take no adapters; start them with --enable-lora.",
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
        """End sessions that are retired and idle."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            for identity, session in list(self._sessions.items()):
                if session.retired and not session.num_streams:
                    del self._sessions[identity]
                    logger.info("worker %s left the routing table", session.endpoint.worker_id)
                    await session.close()


def _with_adapters(sessions: list[WorkerSession], adapters: Sequence[str]) -> list[WorkerSession]:
    """Those whose workers have all of `adapters`. Raises AdapterUnavailableError when none has or will soon have."""
    able = [session for session in sessions if session.endpoint.lacking.keys().isdisjoint(adapters)]
    if sessions and not able:
        reasons = [{session.endpoint.lacking.get(digest, "") for digest in adapters} - {""} for session in sessions]
        if all(reasons):
            raise AdapterUnavailableError(
                f"No worker has the adapter now, since it could not be loaded again: {min(map(min, reasons))}. It is "
                "tried again; until then unload it, or load it in place from where it is. GET /fleet says more.",
                param="model",
            )
    return able
