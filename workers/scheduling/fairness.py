"""Virtual token counters: how much service each tenant has had and, within a tenant, each of its adapters.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024); a flow is what the paper calls a client. A
flow's counter grows by its service (a prompt token counts 1, an output token 2) divided by its weight, and the flow
with the least counter is served next. A flow that begins to wait again is lifted to the least counter of those that
wait, so that idleness earns no credit.

Example: A has had 300, B 100, and both wait. B is served until it passes 300; then they alternate. C comes back after
an hour with a counter of 20: it is lifted to 300 and alternates with them, instead of being served alone for 280.

For two flows that always wait, the difference in service is bounded, however long they do. This file has the counters
and what counts as service; flows.py says who is charged, and when.
"""

from __future__ import annotations

from collections.abc import Hashable, Set
from typing import Generic, TypeVar

from lorafleet.workers.scheduling.ranking import Ranking

PROMPT_TOKEN = 1.0  # service of computing a token of a prompt, once
OUTPUT_TOKEN = 2.0
MAX_IDLE = 1024  # flows without requests whose counters are kept

K = TypeVar("K", bound=Hashable)


class Counters(Generic[K]):
    """One counter for each flow that waits or runs.

    An idle flow's counter is kept only while it is above the level to which it would be lifted on its return, so memory
    is bounded by what is in use (and by `max_idle` while the level stands still).
    """

    def __init__(self, max_idle: int = MAX_IDLE) -> None:
        self._max_idle = max_idle
        self._values: dict[K, float] = {}
        self._waiting: Ranking[K] = Ranking(self._values.__getitem__)
        self._running: set[K] = set()
        self._idle: Ranking[K] = Ranking(self._values.__getitem__)
        self._level = 0.0

    def __getitem__(self, flow: K) -> float:
        """Return the counter of a flow that waits or runs."""
        return self._values[flow]

    @property
    def has_waiting(self) -> bool:
        return len(self._waiting) > 0

    @property
    def has_running(self) -> bool:
        return len(self._running) > 0

    def has_waiting_beside(self, flows: Set[K]) -> bool:
        """Return whether others wait."""
        return any(flow not in flows for flow in self._waiting.take(len(flows) + 1))

    def update(self, flow: K, *, waits: bool, runs: bool) -> None:
        """Say what a flow does from now on: it waits if it has a request that waits, and runs if one runs."""
        level = self._lift()
        if flow not in self._waiting and (waits or flow not in self._running):
            self._values[flow] = max(self._values.get(flow, level), level)
        if waits:
            self._waiting.push(flow)
        else:
            self._waiting.discard(flow)
        if runs:
            self._running.add(flow)
        else:
            self._running.discard(flow)
        if waits or runs:
            self._idle.discard(flow)
        else:
            self._idle.push(flow)
        while (least := self._idle.first()) is not None and (
            self._values[least] <= self._level or len(self._idle) > self._max_idle
        ):
            self._idle.discard(least)
            del self._values[least]

    def charge(self, flow: K, service: float) -> None:
        """Book service, already divided by the weight, to a flow that waits or runs."""
        self._values[flow] += service

    def _lift(self) -> float:
        """Return where a flow begins: the least counter of those that wait or, if none does, of those that run.

        It never falls, and outlives those that it came from.
        """
        first = self._waiting.first()
        if first is not None:
            self._level = max(self._level, self._values[first])
        elif self._running:
            self._level = max(self._level, min(map(self._values.__getitem__, self._running)))
        return self._level

    def check_integrity(self) -> None:
        """Check that only flows that wait, run or are idle are remembered. For tests."""
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
        """Return the number that wait or run."""
        return len(self._adapters)

    def has_waiting_beside(self, tenants: Set[str]) -> bool:
        """Return whether other tenants wait."""
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
        """Return what the order of service compares: the tenant's counter, then its adapter's."""
        return self._tenants[tenant], self._adapters[tenant][adapter]

    def check_integrity(self) -> None:
        """Check both kinds of counters. For tests."""
        self._tenants.check_integrity()
        for adapters in self._adapters.values():
            adapters.check_integrity()
            assert adapters.has_waiting or adapters.has_running
