"""Who wants what: each client's requests that wait, and the order between clients.

A client is one tenant's requests for one adapter, one composition of adapters or the base model. A composition is an
adapter of its own here, but for the slots: it is hot when all its adapters are in slots or on the way there, and cold
when one is not. The order of service: priority (lower first),
the tenant with the least counter, its adapter with the least counter (fairness.py), order of arrival. Only a client's
first request takes part in it, and clients whose adapters are in no slot are ranked apart from the others, so that a
long queue costs nothing but its memory.

Beside it the two lines of those that get nothing at all (turns.py): clients none of whose requests runs wait for a
seat, and their adapters for a slot.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest

from lorafleet.workers.engine.base_seats import BaseSeats
from lorafleet.workers.engine.fairness import OUTPUT_TOKEN, PROMPT_TOKEN, Fairness
from lorafleet.workers.engine.ranking import Ranking
from lorafleet.workers.engine.request import Request
from lorafleet.workers.engine.turns import Line, WaitBound

Rank = tuple[
    int, float, float, int
]  # priority, tenant's counter, adapter's counter, arrival; the least is served first


@dataclass(slots=True, eq=False)
class Client:
    """One tenant's requests for one adapter. Forgotten with its last request."""

    tenant: str
    adapter: str | None  # digest, or a composition's name
    digests: tuple[str, ...]  # of the adapters whose slots its requests need
    since: float  # when it last got a token, or else when it came
    waiting: list[Request] = field(default_factory=list)  # by priority, then arrival
    num_running: int = 0


class Clients:
    """All clients with requests."""

    def __init__(self, bound: WaitBound) -> None:
        self._fairness = Fairness()
        self._clients: dict[tuple[str, str | None], Client] = {}
        self._by_adapter: dict[str | None, Ranking[Client]] = {}  # clients with waiting requests
        self._hot: frozenset[str] = frozenset()  # adapters in slots or on the way there
        self._compositions: dict[str, tuple[str, ...]] = {}  # their names → digests
        self._composed: dict[str, set[str]] = {}  # digests → names of the compositions that have them
        self._hot_compositions: set[str] = set()
        # Clients with waiting requests whose adapters are cold: tenants are ranked, and each tenant's clients. A
        # tenant's counter, which others of its requests let grow, thus is in one key, however many adapters wait.
        self._cold: dict[str, Ranking[Client]] = {}
        self._cold_tenants: Ranking[str] = Ranking(self._rank_of_tenant)
        self.num_waiting = 0  # requests
        self.num_changes = 0  # so far: of who waits and who runs
        self.num_waiting_tokens = 0  # of these: none of them is computed
        self._bound = bound
        self._num_clients: Counter[str] = Counter()  # by adapter
        self._num_turns = 0  # that they would need if none of them were served
        self._unserved: dict[str, Ranking[Client]] = {}  # by adapter: none of the client's requests runs
        self._num_waiting: Counter[str | None] = Counter()  # requests by adapter
        self.base_seats = BaseSeats(bound.num_seats)
        self.num_served_clients = 0
        self.slot_line: Line[str] = Line(bound.num_adapter_places, bound)
        self.seat_line: Line[Client] = Line(bound.num_seats, bound)

    @property
    def num_served_turns(self) -> int:
        """Of the turns that adapters would need for all their clients, those that nobody waits for."""
        return self._num_turns - self.slot_line.num_turns

    def add(self, request: Request, now: float) -> None:
        """A new request waits."""
        client = self._clients.get((request.tenant, request.adapter))
        if client is None:
            client = Client(request.tenant, request.adapter, request.digests, now)
            self._clients[request.tenant, request.adapter] = client
            self._count(client, 1)
        self._enqueue(client, request)

    def start(self, request: Request) -> None:
        """A waiting request runs."""
        client = self._client_of(request)
        self._dequeue(client, request)
        client.num_running += 1
        self.base_seats.num_running += client.adapter is None
        self.num_served_clients += client.num_running == 1
        self._changed(client)

    def put_back(self, request: Request) -> None:
        """A running request waits again."""
        client = self._client_of(request)
        self._end_run(client)
        self._enqueue(client, request)

    def drop(self, request: Request, *, runs: bool) -> None:
        """A request is gone."""
        client = self._client_of(request)
        if runs:
            self._end_run(client)
        else:
            self._dequeue(client, request)
        self._changed(client)

    def charge_prompt(self, request: Request, num_cached_tokens: int) -> None:
        """Book the part of a prompt that is to be computed, once: when the request starts, or its adapter's load."""
        if not request.is_charged:
            request.is_charged = True
            num_tokens = max(0, request.num_prompt_tokens - num_cached_tokens)
            self._charge(request, PROMPT_TOKEN * num_tokens)

    def charge_output(self, request: Request, now: float) -> None:
        """Book a new token of a running request."""
        self._client_of(request).since = now
        self._charge(request, OUTPUT_TOKEN)

    def first(self, adapter: str | None) -> Client | None:
        """Of the clients with requests that wait for this adapter, the one that is served next."""
        clients = self._by_adapter.get(adapter)
        return None if clients is None else clients.first()

    def served_by_turn(self, adapter: str) -> list[Client]:
        """Of the clients with requests that only wait, for this adapter, those that its turn is for, longest first."""
        unserved = self._unserved.get(adapter)
        return [] if unserved is None else unserved.take(self._bound.num_clients_a_turn)

    @property
    def num_kept_seats(self) -> int:
        """More seats that the base model's requests need and may have as its part."""
        return self.base_seats.num_kept(self._num_waiting[None])

    @property
    def num_warm(self) -> int:
        """Requests that lack no more than a seat."""
        return sum(self._num_waiting[adapter] for adapter in (None, *self.hot()))

    @property
    def mean_cold(self) -> float:
        """How many requests wait for each of the adapters that are cold."""
        num_cold = len(self._by_adapter) - len(self.hot()) - (None in self._by_adapter)
        return (self.num_waiting - self.num_warm) / num_cold if num_cold else 0.0

    def num_waiting_for(self, adapter: str | None) -> int:
        """Requests, alone for an adapter or a composition."""
        return self._num_waiting[adapter]

    def wants(self, digest: str) -> bool:
        """Whether requests wait for an adapter, alone or with others."""
        return digest in self._by_adapter or digest in self._composed

    def digests_of(self, adapter: str) -> tuple[str, ...]:
        """The adapters that clients of `adapter` need; of an adapter itself."""
        return self._compositions.get(adapter, (adapter,))

    def hot(self) -> dict[str, tuple[str, ...]]:
        """The adapters and compositions that requests wait for and that are hot, with their digests."""
        hot: dict[str, tuple[str, ...]] = {digest: (digest,) for digest in self._hot if digest in self._by_adapter}
        for name in self._hot_compositions:
            if name in self._by_adapter:
                hot[name] = self._compositions[name]
        return hot

    def set_hot(self, adapters: frozenset[str]) -> None:
        """Say which adapters are in slots or on the way there; all others are cold."""
        if adapters is self._hot:
            return
        changed, self._hot = self._hot ^ adapters, adapters
        for digest in changed:
            for name in self._composed.get(digest, ()):
                self._note_composition(name)
            for adapter in (digest, *self._composed.get(digest, ())):
                for client in self._by_adapter.get(adapter, ()):
                    self._rank_cold(client)

    def first_cold(self) -> Client | None:
        """The client that is served next of those with cold adapters."""
        tenant = self._cold_tenants.first()
        return None if tenant is None else self._cold[tenant].first()

    def next_cold(self, num_adapters: int) -> list[str]:
        """The cold adapters that are likely to be next, some of each tenant, since each that is served is charged."""
        tenants = self._cold_tenants.take(num_adapters)
        if not tenants:
            return []
        columns = [self._cold[tenant].take(-(-num_adapters // len(tenants))) for tenant in tenants]
        clients = [client for row in zip_longest(*columns) for client in row if client is not None]
        adapters = dict.fromkeys(client.adapter for client in clients if client.adapter is not None)  # a set in order
        return list(adapters)[:num_adapters]

    def waiting_for(self, digest: str) -> list[Request]:
        """The requests that wait for this adapter, alone or with others, by arrival."""
        requests = [
            request
            for adapter in (digest, *self._composed.get(digest, ()))
            for client in self._by_adapter.get(adapter, ())
            for request in client.waiting
        ]
        return sorted(requests, key=lambda request: request.arrival)

    def overdue(self, before: float) -> list[Request]:
        """Requests that have never begun, of clients that have got nothing since `before` or longer."""
        clients = self.seat_line.longest(before)
        return [request for client in clients for request in client.waiting if not request.num_output_tokens]

    def rank(self, client: Client) -> Rank:
        """Of a client with waiting requests."""
        return self.rank_of(client.waiting[0])

    def rank_of(self, request: Request) -> Rank:
        """Of a request that waits or runs: whoever ranks last gives way first."""
        return request.priority, *self._fairness.service(request.tenant, request.adapter), request.arrival

    def _rank_of_tenant(self, tenant: str) -> Rank:
        client = self._cold[tenant].first()
        assert client is not None
        return self.rank(client)

    def _rank_in_tenant(self, client: Client) -> tuple[int, float, int]:
        priority, _, counter, arrival = self.rank(client)
        return priority, counter, arrival

    def _rank_cold(self, client: Client) -> None:
        """Put a client into the ranking of cold ones, or take it out."""
        tenant = client.tenant
        if client.waiting and not self._hot.issuperset(client.digests):
            self._cold.setdefault(tenant, Ranking(self._rank_in_tenant)).push(client)
            self._cold_tenants.push(tenant)
        elif (clients := self._cold.get(tenant)) is not None:
            clients.discard(client)
            if not clients:
                del self._cold[tenant]
                self._cold_tenants.discard(tenant)

    def _client_of(self, request: Request) -> Client:
        return self._clients[request.tenant, request.adapter]

    def _charge(self, request: Request, service: float) -> None:
        self._fairness.charge(
            request.tenant,
            request.adapter,
            service,
            tenant_weight=request.tenant_weight,
            adapter_weight=request.adapter_weight,
        )

    def _enqueue(self, client: Client, request: Request) -> None:
        insort(client.waiting, request, key=_in_client)
        self.num_waiting += 1
        self._num_waiting[request.adapter] += 1
        self.num_waiting_tokens += request.num_tokens
        self._changed(client)

    def _dequeue(self, client: Client, request: Request) -> None:
        place = bisect_left(client.waiting, _in_client(request), key=_in_client)
        assert client.waiting[place] is request
        del client.waiting[place]
        self.num_waiting -= 1
        self._num_waiting[request.adapter] -= 1
        if not self._num_waiting[request.adapter]:
            del self._num_waiting[request.adapter]
        self.num_waiting_tokens -= request.num_tokens

    def _end_run(self, client: Client) -> None:
        client.num_running -= 1
        self.base_seats.num_running -= client.adapter is None
        self.num_served_clients -= client.num_running == 0

    def _count(self, client: Client, change: int) -> None:
        """A client has come or gone."""
        adapter, digests = client.adapter, client.digests
        self.base_seats.count(client.tenant, is_base=adapter is None, change=change)
        if adapter is None:
            return
        num_turns = self._bound.num_turns
        self._num_turns -= num_turns(self._num_clients[adapter], len(digests))
        self._num_clients[adapter] += change
        self._num_turns += num_turns(self._num_clients[adapter], len(digests))
        if digests != (adapter,) and adapter not in self._compositions:
            self._compositions[adapter] = digests
            for digest in digests:
                self._composed.setdefault(digest, set()).add(adapter)
            self._note_composition(adapter)
        if not self._num_clients[adapter]:
            del self._num_clients[adapter]
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

    def _changed(self, client: Client) -> None:
        """Bring everything into line with what a client's requests do now."""
        adapter, waits, runs = client.adapter, bool(client.waiting), client.num_running > 0
        self.num_changes += 1
        self._fairness.update(client.tenant, adapter, waits=waits, runs=runs)
        if waits:
            self._by_adapter.setdefault(adapter, Ranking(self.rank)).push(client)
        elif (clients := self._by_adapter.get(adapter)) is not None:
            clients.discard(client)
            if not clients:
                del self._by_adapter[adapter]
        self._rank_cold(client)
        if waits and not runs:
            self.seat_line.put(client, client.since)
        else:
            self.seat_line.discard(client)
        if adapter is not None:
            self._line_up(adapter, client, waits and not runs)
        if not waits and not runs:
            del self._clients[client.tenant, adapter]
            self._count(client, -1)

    def _line_up(self, adapter: str, client: Client, is_unserved: bool) -> None:
        unserved = self._unserved.setdefault(adapter, Ranking(_since))
        if is_unserved:
            unserved.push(client)
        else:
            unserved.discard(client)
        first = unserved.first()
        if first is not None:
            width = len(client.digests)
            self.slot_line.put(adapter, first.since, self._bound.num_turns(len(unserved), width), width)
        else:
            del self._unserved[adapter]
            self.slot_line.discard(adapter)

    def check_integrity(self, running: Iterator[Request] | list[Request]) -> list[Request]:
        """Clients, lines and rankings are those of the requests; returns those that wait. For tests."""
        num_running = Counter((request.tenant, request.adapter) for request in running)
        assert num_running.keys() <= self._clients.keys()
        waiting = []
        for key, client in self._clients.items():
            assert key == (client.tenant, client.adapter)
            assert client.num_running == num_running[key]
            assert client.waiting or client.num_running
            assert client.waiting == sorted(client.waiting, key=_in_client)
            assert all((request.tenant, request.adapter) == key for request in client.waiting)
            assert all(request.digests == client.digests for request in client.waiting)
            assert (client in self._by_adapter.get(client.adapter, ())) == bool(client.waiting)
            assert (client in self.seat_line) == (client.num_running == 0)
            waiting += client.waiting
        assert self.num_waiting == len(waiting)
        assert self.num_waiting_tokens == sum(request.num_tokens for request in waiting)
        assert self.num_served_clients == len(num_running)
        assert self._num_waiting == Counter(request.adapter for request in waiting)
        assert self.base_seats.num_running == sum(num for (_, adapter), num in num_running.items() if adapter is None)
        self.base_seats.check_integrity(self._clients)
        adapters = {request.adapter for request in waiting}
        assert self._by_adapter.keys() == adapters
        cold = {client for client in self._clients.values() if client.waiting}
        cold = {client for client in cold if not self._hot.issuperset(client.digests)}
        assert {client for clients in self._cold.values() for client in clients} == cold
        assert set(self._cold_tenants) == self._cold.keys() == {client.tenant for client in cold}
        lined_up: dict[str, set[Client]] = {}
        for client in self._clients.values():
            if client.adapter is not None and not client.num_running:
                lined_up.setdefault(client.adapter, set()).add(client)
        assert {adapter: set(unserved) for adapter, unserved in self._unserved.items()} == lined_up
        assert len(self.slot_line) == len(lined_up)
        for adapter, unserved in lined_up.items():
            assert self.slot_line.since(adapter) == min(client.since for client in unserved)
        num_turns = self._bound.num_turns
        widths = {adapter: len(self.digests_of(adapter)) for _, adapter in self._clients if adapter is not None}
        assert self.slot_line.num_turns == sum(num_turns(len(own), widths[name]) for name, own in lined_up.items())
        assert self._num_clients == Counter(adapter for _, adapter in self._clients if adapter is not None)
        assert self._num_turns == sum(num_turns(num, widths[name]) for name, num in self._num_clients.items())
        compositions = {client.adapter: client.digests for client in self._clients.values()}
        compositions = {name: own for name, own in compositions.items() if name is not None and own != (name,)}
        assert self._compositions == compositions
        pairs = {(digest, name) for name, digests in compositions.items() for digest in digests}
        assert {(digest, name) for digest, names in self._composed.items() for name in names} == pairs
        assert self._hot_compositions == {name for name, own in compositions.items() if self._hot.issuperset(own)}
        assert len(self.seat_line) == sum(not client.num_running for client in self._clients.values())
        for clients in self._by_adapter.values():
            clients.check_integrity()
        for clients in self._cold.values():
            clients.check_integrity()
        self._cold_tenants.check_integrity()
        self.slot_line.check_integrity()
        self.seat_line.check_integrity()
        self._fairness.check_integrity()
        return waiting


def _in_client(request: Request) -> tuple[int, int]:
    return request.priority, request.arrival


def _since(client: Client) -> float:
    return client.since
