"""Who has had how much: virtual token counters, between tenants and, within a tenant, between its adapters.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), the virtual token counter (VTC): a client's
counter grows by the service that it gets, divided by its weight, and the client with the least counter is served next.
A client that begins to wait again is lifted to the least counter of those that wait, so that idleness earns no credit.
With it, the service of two clients that both wait all the time differs by a bounded amount, however long that time is.

Here: what counts as service and the counters. Who is charged, and when, is clients.py's and its callers'.
"""

from __future__ import annotations

from collections.abc import Hashable, Set
from typing import Generic, TypeVar

from lorafleet.workers.engine.ranking import Ranking

PROMPT_TOKEN = 1.0  # service of computing a token of a prompt, once
OUTPUT_TOKEN = 2.0
MAX_IDLE = 1024  # clients of one kind whose counters are kept while they have no requests

K = TypeVar("K", bound=Hashable)


class Counters(Generic[K]):
    """One counter for each client that waits or runs.

    An idle client's is kept only while it is above the level that it would be lifted to on its return, so that the
    memory is bounded by what is in use (and by `max_idle` where the level stands still).
    """

    def __init__(self, max_idle: int = MAX_IDLE) -> None:
        self._max_idle = max_idle
        self._values: dict[K, float] = {}
        self._waiting: Ranking[K] = Ranking(self._values.__getitem__)
        self._running: set[K] = set()
        self._idle: Ranking[K] = Ranking(self._values.__getitem__)
        self._level = 0.0

    def __getitem__(self, client: K) -> float:
        """The weighted service of a client that waits or runs, above where it was lifted to."""
        return self._values[client]

    @property
    def has_waiting(self) -> bool:
        return len(self._waiting) > 0

    @property
    def has_running(self) -> bool:
        return len(self._running) > 0

    def has_waiting_beside(self, clients: Set[K]) -> bool:
        """Whether others wait."""
        return any(client not in clients for client in self._waiting.take(len(clients) + 1))

    def update(self, client: K, *, waits: bool, runs: bool) -> None:
        """Say what a client does from now on: it waits if it has a request that waits, and runs if one runs."""
        level = self._lift()
        if client not in self._waiting and (waits or client not in self._running):
            self._values[client] = max(self._values.get(client, level), level)
        if waits:
            self._waiting.push(client)
        else:
            self._waiting.discard(client)
        if runs:
            self._running.add(client)
        else:
            self._running.discard(client)
        if waits or runs:
            self._idle.discard(client)
        else:
            self._idle.push(client)
        while (least := self._idle.first()) is not None and (
            self._values[least] <= self._level or len(self._idle) > self._max_idle
        ):
            self._idle.discard(least)
            del self._values[least]

    def charge(self, client: K, service: float) -> None:
        """Book service, already divided by the weight, to a client that waits or runs."""
        self._values[client] += service

    def _lift(self) -> float:
        """Where a client begins: the least counter of those that wait; if nobody does, of those that run.

        It never falls, and outlives those that it came from.
        """
        first = self._waiting.first()
        if first is not None:
            self._level = max(self._level, self._values[first])
        elif self._running:
            self._level = max(self._level, min(map(self._values.__getitem__, self._running)))
        return self._level

    def check_integrity(self) -> None:
        """Clients wait, run or are idle, and nobody else is remembered. For tests."""
        assert self._values.keys() == {*self._waiting, *self._running, *self._idle}
        assert not set(self._idle) & {*self._waiting, *self._running}
        assert len(self._idle) <= self._max_idle
        self._waiting.check_integrity()
        self._idle.check_integrity()


class Fairness:
    """Counters of tenants, and of each tenant's adapters (None is the base model)."""

    def __init__(self) -> None:
        self._tenants: Counters[str] = Counters()
        self._adapters: dict[str, Counters[str | None]] = {}  # of tenants that wait or run

    @property
    def num_tenants(self) -> int:
        """That wait or run."""
        return len(self._adapters)

    def has_waiting_beside(self, tenants: Set[str]) -> bool:
        """Whether other tenants wait."""
        return self._tenants.has_waiting_beside(tenants)

    def update(self, tenant: str, adapter: str | None, *, waits: bool, runs: bool) -> None:
        """Say what one tenant's requests for one adapter do from now on."""
        adapters = self._adapters.get(tenant)
        if adapters is None:
            adapters = self._adapters[tenant] = Counters()
        adapters.update(adapter, waits=waits, runs=runs)
        self._tenants.update(tenant, waits=adapters.has_waiting, runs=adapters.has_running)
        if not (adapters.has_waiting or adapters.has_running):
            del self._adapters[tenant]

    def charge(
        self, tenant: str, adapter: str | None, service: float, *, tenant_weight: float, adapter_weight: float
    ) -> None:
        """Book service to a tenant and its adapter, of which at least one request waits or runs."""
        self._tenants.charge(tenant, service / tenant_weight)
        self._adapters[tenant].charge(adapter, service / adapter_weight)

    def service(self, tenant: str, adapter: str | None) -> tuple[float, float]:
        """What the order of service compares: the tenant's counter, then its adapter's."""
        return self._tenants[tenant], self._adapters[tenant][adapter]

    def check_integrity(self) -> None:
        """For tests."""
        self._tenants.check_integrity()
        for adapters in self._adapters.values():
            adapters.check_integrity()
            assert adapters.has_waiting or adapters.has_running
