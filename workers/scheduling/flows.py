"""Flows: each one's waiting requests, and the order of service between flows.

A flow is one tenant's requests for one adapter, one composition of adapters or the base model. A composition counts as
an adapter of its own here, except for slots: it is hot if all its adapters are loading or ready, else cold. The order
of service is priority (lower first), the tenant with the least counter, its adapter with the least counter
(fairness.py), arrival. Only a flow's first request is ranked, and flows with cold adapters are ranked apart from the
others, so that a long queue costs nothing but its memory.

Unserved flows, none of whose requests runs, also wait in two lines (turns.py): the flows for a seat, and their adapters
for a slot.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import KW_ONLY, dataclass, field
from itertools import zip_longest

from lorafleet.workers.scheduling.base_seats import BaseSeats
from lorafleet.workers.scheduling.fairness import OUTPUT_TOKEN, PROMPT_TOKEN, Fairness
from lorafleet.workers.scheduling.ranking import Ranking
from lorafleet.workers.scheduling.request import Request
from lorafleet.workers.scheduling.turns import Line, WaitBound

# Priority, tenant's counter, adapter's counter, arrival; the least is served first.
Rank = tuple[int, float, float, int]


@dataclass(slots=True, eq=False)
class Flow:
    """One tenant's requests for one adapter. It ends with its last request."""

    tenant: str
    adapter: str | None  # digest, composition's name, or None: the base model
    digests: tuple[str, ...]  # adapters whose slots its requests need
    since: float  # when it last got a token, or else when it arrived
    _: KW_ONLY
    waiting: list[Request] = field(default_factory=list)  # by priority, then arrival
    num_running: int = 0


class Flows:
    """All flows that have requests."""

    def __init__(self, bound: WaitBound) -> None:
        self._fairness = Fairness()
        self._flows: dict[tuple[str, str | None], Flow] = {}
        self._by_adapter: dict[str | None, Ranking[Flow]] = {}  # flows with waiting requests
        self._hot: frozenset[str] = frozenset()  # adapters that are loading or ready
        self._compositions: dict[str, tuple[str, ...]] = {}  # names → digests
        self._composed: dict[str, set[str]] = {}  # digests → names of compositions of them
        self._hot_compositions: set[str] = set()
        # Flows with waiting requests whose adapters are cold: tenants are ranked, and each tenant's flows. So a
        # tenant's counter, which grows with its other requests, is in one key, however many adapters wait.
        self._cold: dict[str, Ranking[Flow]] = {}
        self._cold_tenants: Ranking[str] = Ranking(self._rank_of_tenant)
        self.num_waiting = 0  # requests
        self.num_changes = 0  # so far, of the requests that wait and run
        self.num_waiting_tokens = 0  # of waiting requests; none is computed
        self._bound = bound
        self._num_flows: Counter[str] = Counter()  # by adapter
        self._num_turns = 0  # turns that all flows would need if none were served
        self._unserved: dict[str, Ranking[Flow]] = {}  # by adapter: flows none of whose requests runs
        self._num_waiting: Counter[str | None] = Counter()  # requests by adapter
        self.base_seats = BaseSeats(bound.num_seats)
        self.num_served_flows = 0
        self.slot_line: Line[str] = Line(bound.num_adapter_places, bound)
        self.seat_line: Line[Flow] = Line(bound.num_seats, bound)

    @property
    def num_served_turns(self) -> int:
        """Return the turns already being served: all turns needed minus those still in line."""
        return self._num_turns - self.slot_line.num_turns

    @property
    def num_tenants(self) -> int:
        """Return the number of tenants with requests that wait or run."""
        return self._fairness.num_tenants

    def has_waiting_beside(self, tenants: Set[str]) -> bool:
        """Return whether requests of other tenants wait."""
        return self._fairness.has_waiting_beside(tenants)

    def add(self, request: Request, now: float) -> None:
        """Add a new request, which waits."""
        flow = self._flows.get((request.tenant, request.adapter))
        if flow is None:
            flow = Flow(request.tenant, request.adapter, request.digests, now)
            self._flows[request.tenant, request.adapter] = flow
            self._count(flow, 1)
        self._enqueue(flow, request)

    def start(self, request: Request) -> None:
        """Move a waiting request to the running ones."""
        flow = self._flow_of(request)
        self._dequeue(flow, request)
        flow.num_running += 1
        self.base_seats.num_running += flow.adapter is None
        self.num_served_flows += flow.num_running == 1
        self._changed(flow)

    def put_back(self, request: Request) -> None:
        """Move a running request back to the waiting ones."""
        flow = self._flow_of(request)
        self._end_run(flow)
        self._enqueue(flow, request)

    def drop(self, request: Request, *, runs: bool) -> None:
        """Remove a request that waits or runs."""
        flow = self._flow_of(request)
        if runs:
            self._end_run(flow)
        else:
            self._dequeue(flow, request)
        self._changed(flow)

    def charge_prompt(self, request: Request, num_cached_tokens: int) -> None:
        """Charge the tokens of a prompt that must be computed, once: when the request or its adapter's load starts."""
        if not request.is_charged:
            request.is_charged = True
            num_tokens = max(0, request.num_prompt_tokens - num_cached_tokens)
            self._charge(request, PROMPT_TOKEN * num_tokens)

    def charge_output(self, request: Request, now: float) -> None:
        """Charge a new token of a running request."""
        self._flow_of(request).since = now
        self._charge(request, OUTPUT_TOKEN)

    def first(self, adapter: str | None) -> Flow | None:
        """Return the next flow to serve of those with waiting requests for this adapter."""
        flows = self._by_adapter.get(adapter)
        return None if flows is None else flows.first()

    def num_flows_for(self, adapter: str | None) -> int:
        """Return the number of flows with waiting requests for this adapter."""
        return len(self._by_adapter.get(adapter, ()))

    def first_beside(self, tenants: Set[str], adapter: str | None) -> Flow | None:
        """Return the same as `first`, leaving out some tenants."""
        if not tenants:
            return self.first(adapter)
        flows = self._by_adapter.get(adapter)
        firsts = [] if flows is None else flows.take(len(tenants) + 1)  # a tenant has at most one
        return next((flow for flow in firsts if flow.tenant not in tenants), None)

    def served_by_turn(self, adapter: str) -> list[Flow]:
        """Return the unserved flows covered by this adapter's next turn, longest wait first."""
        unserved = self._unserved.get(adapter)
        return [] if unserved is None else unserved.take(self._bound.num_flows_a_turn)

    @property
    def num_kept_seats(self) -> int:
        """Return how many more seats are kept for the base model's waiting requests."""
        return self.base_seats.num_kept(self._num_waiting[None])

    @property
    def num_warm(self) -> int:
        """Return the number of requests that lack only a seat."""
        return sum(self._num_waiting[adapter] for adapter in (None, *self.hot()))

    @property
    def mean_cold(self) -> float:
        """Return the mean number of waiting requests of a cold adapter."""
        num_cold = len(self._by_adapter) - len(self.hot()) - (None in self._by_adapter)
        return (self.num_waiting - self.num_warm) / num_cold if num_cold else 0.0

    def num_waiting_for(self, adapter: str | None) -> int:
        """Return the number of waiting requests for exactly this adapter or composition."""
        return self._num_waiting[adapter]

    def wants(self, digest: str) -> bool:
        """Return whether requests wait for an adapter, alone or in a composition."""
        return digest in self._by_adapter or digest in self._composed

    def digests_of(self, adapter: str) -> tuple[str, ...]:
        """Return the digests of a composition's adapters, or of an adapter itself."""
        return self._compositions.get(adapter, (adapter,))

    def hot(self) -> dict[str, tuple[str, ...]]:
        """Return the hot adapters and compositions that have waiting requests, with their digests."""
        hot: dict[str, tuple[str, ...]] = {digest: (digest,) for digest in self._hot if digest in self._by_adapter}
        for name in self._hot_compositions:
            if name in self._by_adapter:
                hot[name] = self._compositions[name]
        return hot

    def set_hot(self, adapters: frozenset[str]) -> None:
        """Set which adapters are loading or ready; all others are cold."""
        if adapters is self._hot:
            return
        changed, self._hot = self._hot ^ adapters, adapters
        for digest in changed:
            for name in self._composed.get(digest, ()):
                self._note_composition(name)
            for adapter in (digest, *self._composed.get(digest, ())):
                for flow in self._by_adapter.get(adapter, ()):
                    self._rank_cold(flow)

    def next_cold(self, num_adapters: int) -> list[str]:
        """Return the cold adapters that are likely to be next: some of each tenant, since service is charged."""
        tenants = self._cold_tenants.take(num_adapters)
        if not tenants:
            return []
        columns = [self._cold[tenant].take(-(-num_adapters // len(tenants))) for tenant in tenants]
        flows = [flow for row in zip_longest(*columns) for flow in row if flow is not None]
        adapters = dict.fromkeys(flow.adapter for flow in flows if flow.adapter is not None)  # a set in order
        return list(adapters)[:num_adapters]

    def waiting_for(self, digest: str) -> list[Request]:
        """Return the requests that wait for this adapter, alone or in a composition, by arrival."""
        requests = [
            request
            for adapter in (digest, *self._composed.get(digest, ()))
            for flow in self._by_adapter.get(adapter, ())
            for request in flow.waiting
        ]
        return sorted(requests, key=lambda request: request.arrival)

    def overdue(self, before: float) -> list[Request]:
        """Return requests that have never begun, of flows that have received nothing since `before` or longer."""
        flows = self.seat_line.longest(before)
        return [request for flow in flows for request in flow.waiting if not request.num_output_tokens]

    def rank(self, flow: Flow) -> Rank:
        """Return the rank of a flow with waiting requests."""
        return self.rank_of(flow.waiting[0])

    def rank_of(self, request: Request) -> Rank:
        """Return the rank of a request that waits or runs; the lowest-ranked is preempted first."""
        return request.priority, *self._fairness.service(request.tenant, request.adapter), request.arrival

    def _rank_of_tenant(self, tenant: str) -> Rank:
        flow = self._cold[tenant].first()
        assert flow is not None
        return self.rank(flow)

    def rank_in_tenant(self, flow: Flow) -> tuple[int, float, int]:
        """Return the rank of a flow with waiting requests among its tenant's flows."""
        priority, _, counter, arrival = self.rank(flow)
        return priority, counter, arrival

    def _rank_cold(self, flow: Flow) -> None:
        """Add a flow to the ranking of cold flows, or remove it."""
        tenant = flow.tenant
        if flow.waiting and not self._hot.issuperset(flow.digests):
            self._cold.setdefault(tenant, Ranking(self.rank_in_tenant)).push(flow)
            self._cold_tenants.push(tenant)
        elif (flows := self._cold.get(tenant)) is not None:
            flows.discard(flow)
            if not flows:
                del self._cold[tenant]
                self._cold_tenants.discard(tenant)

    def _flow_of(self, request: Request) -> Flow:
        return self._flows[request.tenant, request.adapter]

    def _charge(self, request: Request, service: float) -> None:
        self._fairness.charge(
            request.tenant,
            request.adapter,
            service,
            tenant_weight=request.tenant_weight,
            adapter_weight=request.adapter_weight,
        )

    def _enqueue(self, flow: Flow, request: Request) -> None:
        insort(flow.waiting, request, key=_in_flow)
        self.num_waiting += 1
        self._num_waiting[request.adapter] += 1
        self.num_waiting_tokens += request.num_tokens
        self._changed(flow)

    def _dequeue(self, flow: Flow, request: Request) -> None:
        place = bisect_left(flow.waiting, _in_flow(request), key=_in_flow)
        assert flow.waiting[place] is request
        del flow.waiting[place]
        self.num_waiting -= 1
        self._num_waiting[request.adapter] -= 1
        if not self._num_waiting[request.adapter]:
            del self._num_waiting[request.adapter]
        self.num_waiting_tokens -= request.num_tokens

    def _end_run(self, flow: Flow) -> None:
        flow.num_running -= 1
        self.base_seats.num_running -= flow.adapter is None
        self.num_served_flows -= flow.num_running == 0

    def _count(self, flow: Flow, change: int) -> None:
        """Count a flow that begins (1) or ends (-1)."""
        adapter, digests = flow.adapter, flow.digests
        self.base_seats.count(flow.tenant, is_base=adapter is None, change=change)
        if adapter is None:
            return
        num_turns = self._bound.num_turns
        self._num_turns -= num_turns(self._num_flows[adapter], len(digests))
        self._num_flows[adapter] += change
        self._num_turns += num_turns(self._num_flows[adapter], len(digests))
        if digests != (adapter,) and adapter not in self._compositions:
            self._compositions[adapter] = digests
            for digest in digests:
                self._composed.setdefault(digest, set()).add(adapter)
            self._note_composition(adapter)
        if not self._num_flows[adapter]:
            del self._num_flows[adapter]
            self._forget_composition(adapter)

    def _note_composition(self, name: str) -> None:
        is_hot = self._hot.issuperset(self._compositions[name])
        (self._hot_compositions.add if is_hot else self._hot_compositions.discard)(name)

    def _forget_composition(self, name: str) -> None:
        self._hot_compositions.discard(name)
        for digest in self._compositions.pop(name, ()):
            self._composed[digest].discard(name)
            if not self._composed[digest]:
                del self._composed[digest]

    def _changed(self, flow: Flow) -> None:
        """Update rankings and lines after a change of a flow's requests."""
        adapter, waits, runs = flow.adapter, bool(flow.waiting), flow.num_running > 0
        self.num_changes += 1
        self._fairness.update(flow.tenant, adapter, waits=waits, runs=runs)
        if waits:
            self._by_adapter.setdefault(adapter, Ranking(self.rank)).push(flow)
        elif (flows := self._by_adapter.get(adapter)) is not None:
            flows.discard(flow)
            if not flows:
                del self._by_adapter[adapter]
        self._rank_cold(flow)
        if waits and not runs:
            self.seat_line.put(flow, flow.since)
        else:
            self.seat_line.discard(flow)
        if adapter is not None:
            self._line_up(adapter, flow, waits and not runs)
        if not waits and not runs:
            del self._flows[flow.tenant, adapter]
            self._count(flow, -1)

    def _line_up(self, adapter: str, flow: Flow, is_unserved: bool) -> None:
        unserved = self._unserved.setdefault(adapter, Ranking(_since))
        if is_unserved:
            unserved.push(flow)
        else:
            unserved.discard(flow)
        first = unserved.first()
        if first is not None:
            width = len(flow.digests)
            self.slot_line.put(adapter, first.since, self._bound.num_turns(len(unserved), width), width)
        else:
            del self._unserved[adapter]
            self.slot_line.discard(adapter)

    def check_integrity(self, running: Iterator[Request] | list[Request]) -> list[Request]:
        """Check that flows, lines and rankings are those of the requests. Return those that wait. For tests."""
        num_running = Counter((request.tenant, request.adapter) for request in running)
        assert num_running.keys() <= self._flows.keys()
        waiting = []
        for key, flow in self._flows.items():
            assert key == (flow.tenant, flow.adapter)
            assert flow.num_running == num_running[key]
            assert flow.waiting or flow.num_running
            assert flow.waiting == sorted(flow.waiting, key=_in_flow)
            assert all((request.tenant, request.adapter) == key for request in flow.waiting)
            assert all(request.digests == flow.digests for request in flow.waiting)
            assert (flow in self._by_adapter.get(flow.adapter, ())) == bool(flow.waiting)
            assert (flow in self.seat_line) == (flow.num_running == 0)
            waiting += flow.waiting
        assert self.num_waiting == len(waiting)
        assert self.num_waiting_tokens == sum(request.num_tokens for request in waiting)
        assert self.num_served_flows == len(num_running)
        assert self._num_waiting == Counter(request.adapter for request in waiting)
        assert self.base_seats.num_running == sum(num for (_, adapter), num in num_running.items() if adapter is None)
        self.base_seats.check_integrity(self._flows)
        adapters = {request.adapter for request in waiting}
        assert self._by_adapter.keys() == adapters
        cold = {flow for flow in self._flows.values() if flow.waiting}
        cold = {flow for flow in cold if not self._hot.issuperset(flow.digests)}
        assert {flow for flows in self._cold.values() for flow in flows} == cold
        assert set(self._cold_tenants) == self._cold.keys() == {flow.tenant for flow in cold}
        lined_up: dict[str, set[Flow]] = {}
        for flow in self._flows.values():
            if flow.adapter is not None and not flow.num_running:
                lined_up.setdefault(flow.adapter, set()).add(flow)
        assert {adapter: set(unserved) for adapter, unserved in self._unserved.items()} == lined_up
        assert len(self.slot_line) == len(lined_up)
        for adapter, unserved in lined_up.items():
            assert self.slot_line.since(adapter) == min(flow.since for flow in unserved)
        num_turns = self._bound.num_turns
        widths = {adapter: len(self.digests_of(adapter)) for _, adapter in self._flows if adapter is not None}
        assert self.slot_line.num_turns == sum(num_turns(len(own), widths[name]) for name, own in lined_up.items())
        assert self._num_flows == Counter(adapter for _, adapter in self._flows if adapter is not None)
        assert self._num_turns == sum(num_turns(num, widths[name]) for name, num in self._num_flows.items())
        compositions = {flow.adapter: flow.digests for flow in self._flows.values()}
        compositions = {name: own for name, own in compositions.items() if name is not None and own != (name,)}
        assert self._compositions == compositions
        pairs = {(digest, name) for name, digests in compositions.items() for digest in digests}
        assert {(digest, name) for digest, names in self._composed.items() for name in names} == pairs
        assert self._hot_compositions == {name for name, own in compositions.items() if self._hot.issuperset(own)}
        assert len(self.seat_line) == sum(not flow.num_running for flow in self._flows.values())
        for flows in self._by_adapter.values():
            flows.check_integrity()
        for flows in self._cold.values():
            flows.check_integrity()
        self._cold_tenants.check_integrity()
        self.slot_line.check_integrity()
        self.seat_line.check_integrity()
        self._fairness.check_integrity()
        return waiting


def _in_flow(request: Request) -> tuple[int, int]:
    return request.priority, request.arrival


def _since(flow: Flow) -> float:
    return flow.since
