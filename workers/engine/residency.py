"""Which adapters hold slots and since when, what a request lacks of them, and how it gets that.

Only an adapter that is at hand, in host memory, gets a slot: so no slot stands empty for as long as a disk takes, and
one whose read hangs takes nothing from anybody. The next ones in line are announced to the host tier, which says when
each has come.

Owns: the times, the loads that a step starts, what was announced. Leaves to others: which slot and who is evicted
(adapter_slots.py), who may have one (scheduler.py, preemption.py), who must let go (claims.py).

A composition of adapters takes the slots of all of them or of none: loads start for all that are cold at once, or not
at all, and what it finds in slots is kept for it only from then on. So none holds a slot while it waits for another
one; it waits for loads, which end by themselves, or for seats and pages, whose holders wait for no slot. Nobody waits
in a circle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from lorafleet.workers.engine.adapter_slots import AdapterSlots
from lorafleet.workers.engine.batch import SlotLoad
from lorafleet.workers.engine.clients import Client, Clients
from lorafleet.workers.engine.request import Request
from lorafleet.workers.engine.request_pages import RequestPages
from lorafleet.workers.engine.turns import SlotPace, SlotTurns

_OVERDUE = 2.0  # turns after which an announced adapter that has not come counts no more among those that may
_SIDE_BY_SIDE = 4  # reads that a host tier makes at a time, at least


class Residency:
    """Adapters are cold (in no slot and not on the way there), loading, or ready. Times are the caller's."""

    def __init__(
        self,
        slots: AdapterSlots,
        clients: Clients,
        pages: RequestPages,
        pace: SlotPace,
        is_in_host: Callable[[str], bool],
    ) -> None:
        """is_in_host: whether an adapter is in host memory now."""
        self._slots = slots
        self._clients = clients
        self._pages = pages
        self._pace = pace
        self._is_in_host = is_in_host
        self._held_since: dict[str, float] = {}  # adapters in or on the way into slots → when they got them
        self._loading_since: dict[str, float] = {}
        self._started: list[SlotLoad] = []  # since the last `take_started`
        self._announced: dict[str, float] = {}  # adapters that were in a plan's prefetches and still wait → since when
        self._come: dict[
            str, float
        ] = {}  # adapters that came and have got no slot yet → for how long each kept it busy
        self.num_come = 0  # so far
        self._num_overdue = 0  # of those that were announced

    def update_clients(self, now: float, num_places: float) -> SlotTurns:
        """Tell the clients what has come of loads since the last step, and how slots change hands from now on.

        num_places: of `SlotPace.turns`.
        """
        for digest in [digest for digest in self._loading_since if not self._slots.is_loading(digest)]:
            since = self._loading_since.pop(digest)
            if self._slots.slot_of(digest) is not None:
                self._pace.book(empty_s=now - since)
        self._clients.set_hot(self._slots.occupants())
        turns = self._pace.turns(num_places)
        self._clients.slot_line.set_turns(turns)
        return turns

    @property
    def empty_share(self) -> float:
        """The part of a turn in which its slot stands empty, since its adapter is on the way."""
        return self._pace.empty_share

    def come(self, digest: str, now: float) -> None:
        """An announced adapter is in host memory."""
        num_coming = sum(other not in self._come for other in self._announced)
        self._come[digest] = (now - self._announced.get(digest, now)) / max(num_coming, _SIDE_BY_SIDE)
        self.num_come += 1

    def has_come(self, digest: str) -> bool:
        """Whether an adapter waits in host memory for a slot. For any thread."""
        return digest in self._come

    def are_at_hand(self, client: Client) -> bool:
        """Whether all that a client's adapter lacks is or was in host memory, which may lack room for several."""
        return all(digest in self._come or self._is_in_host(digest) for digest in self.missing(client))

    def could_load(self, adapter: str) -> bool:
        """Whether what clients of `adapter` lack is in no slot, and all of that at hand."""
        client = self._clients.first(adapter)
        return client is not None and bool(self.missing(client)) and self.are_at_hand(client)

    def next_at_hand(self) -> list[Client]:
        """Of the clients of cold adapters that are likely to be served next, those whose adapters are at hand."""
        firsts = map(self._clients.first, self._clients.next_cold(self._slots.num_slots + self._num_overdue))
        return [client for client in firsts if client is not None and self.are_at_hand(client)]

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
        self._loading_since.update(dict.fromkeys(missing, now))
        for digest in missing:
            self._pace.book(ready_s=self._come.pop(digest, 0.0))
        request = client.waiting[0]
        self._clients.charge_prompt(request, self._pages.num_found_tokens(request))
        self._clients.set_hot(self._slots.occupants())
        return True

    def take_started(self) -> tuple[SlotLoad, ...]:
        """The loads that were started since the last call."""
        started, self._started = self._started, []
        return tuple(started)

    def announce(self, adapters: Iterable[str], now: float, turn_s: float) -> tuple[str, ...]:
        """Of adapters and compositions that are to have slots, the adapters to bring into the host cache.

        adapters: that must have slots; then the cold ones that are likely to be served next. At most one a slot, not
        counting those that are long overdue; each is named once for as long as it is in line.
        """
        cold = self._clients.next_cold(self._slots.num_slots + self._num_overdue)
        digests = [digest for adapter in [*adapters, *cold] for digest in self._clients.digests_of(adapter)]
        next_up = dict.fromkeys(digest for digest in digests if self._is_cold(digest))  # a set in order
        names: dict[str, float] = {}
        num_left = self._slots.num_slots
        self._num_overdue = 0
        for digest in next_up:
            since = self._announced.get(digest, now)
            is_overdue = digest not in self._come and now - since > _OVERDUE * turn_s and not self._is_in_host(digest)
            self._num_overdue += is_overdue
            num_left -= not is_overdue
            if num_left < 0:
                break
            names[digest] = since
        fresh = tuple(digest for digest in names if digest not in self._announced)
        self._announced = names
        for digest in [digest for digest in self._come if not self._is_wanted(digest)]:
            del self._come[digest]
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

    def _is_wanted(self, digest: str) -> bool:
        return self._is_cold(digest) and self._clients.wants(digest)

    def _is_cold(self, digest: str) -> bool:
        return self._slots.slot_of(digest) is None and not self._slots.is_loading(digest)

    def check_integrity(self, running: Sequence[Request]) -> None:
        """Those that run have their adapters' pins, and nobody else has one. Between steps. For tests."""
        self._slots.check_integrity()
        pins = Counter(digest for request in running for digest in request.digests)
        assert pins == self._slots._pins
        assert pins.keys() <= self._held_since.keys()
        assert not self._started
