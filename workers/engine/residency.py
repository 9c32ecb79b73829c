"""Which adapters hold slots and since when, what a request lacks of them, and how it gets that.

Owns: the times, the loads that a step starts, what was announced to the host cache. Leaves to others: which slot and
who is evicted (adapter_slots.py), who may have one (scheduler.py, preemption.py), who must let go (claims.py).

A composition of adapters takes the slots of all of them or of none: loads start for all that are cold at once, or not
at all, and what it finds in slots is kept for it only from then on. So none holds a slot while it waits for another
one; it waits for loads, which end by themselves, or for seats and pages, whose holders wait for no slot. Nobody waits
in a circle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from lorafleet.workers.engine.adapter_slots import AdapterSlots
from lorafleet.workers.engine.batch import SlotLoad
from lorafleet.workers.engine.clients import Client, Clients
from lorafleet.workers.engine.request import Request
from lorafleet.workers.engine.request_pages import RequestPages


class Residency:
    """Adapters are cold (in no slot and not on the way there), loading, or ready. Times are the caller's."""

    def __init__(self, slots: AdapterSlots, clients: Clients, pages: RequestPages) -> None:
        self._slots = slots
        self._clients = clients
        self._pages = pages
        self._held_since: dict[str, float] = {}  # adapters in or on the way into slots → when they got them
        self._started: list[SlotLoad] = []  # since the last `take_started`
        self._announced: set[str] = set()  # adapters that still wait for a slot and were in a plan's prefetches

    def update_clients(self) -> None:
        """Tell the clients what has come of loads and pins since the last step."""
        self._clients.set_hot(self._slots.occupants())
        self._clients.set_pinned(self._slots.num_staying)

    def slots_of(self, digests: tuple[str, ...]) -> tuple[int, ...]:
        """The slots of adapters that are ready."""
        slots = [slot for digest in digests if (slot := self._slots.slot_of(digest)) is not None]
        assert len(slots) == len(digests)
        return tuple(slots)

    def are_ready(self, digests: tuple[str, ...]) -> bool:
        return all(self._slots.slot_of(digest) is not None for digest in digests)

    def missing(self, client: Client) -> list[str]:
        """Of the adapters that a client needs, the cold ones."""
        return [digest for digest in client.digests if self._is_cold(digest)]

    def held_since(self, digest: str) -> float:
        """When an adapter that is loading or pinned got its slot."""
        return self._held_since[digest]

    def was_held_at(self, digest: str, then: float) -> bool:
        """Whether a ready adapter has had its slot since `then`, or is idle."""
        return self._held_since.get(digest, then) <= then

    def start_load(self, client: Client, keep: set[str], now: float) -> bool:
        """Bring all that a client's adapter lacks into slots, if they can be had. From here on it counts as served.

        keep: adapters that are not evicted for it.
        """
        missing = self.missing(client)
        slots = self._slots.start_loads(missing, keep.union(client.digests))
        if slots is None:
            return False
        self._started += [SlotLoad(digest, slot) for digest, slot in zip(missing, slots, strict=True)]
        self._held_since = {held: since for held, since in self._held_since.items() if not self._is_cold(held)}
        self._held_since.update(dict.fromkeys(missing, now))
        request = client.waiting[0]
        self._clients.charge_prompt(request, self._pages.num_found_tokens(request))
        self._clients.set_hot(self._slots.occupants())
        return True

    def take_started(self) -> tuple[SlotLoad, ...]:
        """The loads that were started since the last call."""
        started, self._started = self._started, []
        return tuple(started)

    def announce(self, adapters: Iterable[str]) -> tuple[str, ...]:
        """Of adapters and compositions that are next in line for slots, the adapters to bring into the host cache.

        At most one a slot; each is named once for as long as it is in line.
        """
        digests = [digest for adapter in adapters for digest in self._clients.digests_of(adapter)]
        next_up = dict.fromkeys(digest for digest in digests if self._is_cold(digest))  # a set in order
        names = list(next_up)[: self._slots.num_slots]
        fresh = tuple(digest for digest in names if digest not in self._announced)
        self._announced = self._announced.intersection(names).union(fresh)
        return fresh

    def pin(self, request: Request, now: float) -> None:
        """A request runs, and its adapters stay in their slots."""
        for digest in request.digests:
            self._slots.pin(digest)
            self._held_since.setdefault(digest, now)

    def unpin(self, request: Request) -> None:
        for digest in request.digests:
            self._slots.unpin(digest)
            if not self._slots.is_pinned(digest):
                del self._held_since[digest]

    def _is_cold(self, digest: str) -> bool:
        return self._slots.slot_of(digest) is None and not self._slots.is_loading(digest)

    def check_integrity(self, running: Sequence[Request]) -> None:
        """Those that run have their adapters' pins, and nobody else has one. Between steps. For tests."""
        self._slots.check_integrity()
        pins = Counter(digest for request in running for digest in request.digests)
        assert pins == self._slots._pins
        assert pins.keys() <= self._held_since.keys()
        assert not self._started
