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

from lorafleet.workers.scheduling.adapter_slots import AdapterSlots
from lorafleet.workers.scheduling.batch import SlotLoad
from lorafleet.workers.scheduling.flows import Flow, Flows
from lorafleet.workers.scheduling.request import Request
from lorafleet.workers.scheduling.request_pages import RequestPages
from lorafleet.workers.scheduling.turns import SlotPace, SlotTurns

_OVERDUE = 2.0  # turns after which an announced adapter that has not come counts no more among those that may
_SIDE_BY_SIDE = 4  # reads that a host tier makes at a time, at least


class Residency:
    """Adapters are cold (in no slot and not on the way there), loading, or ready. Times are the caller's."""

    def __init__(
        self,
        slots: AdapterSlots,
        flows: Flows,
        pages: RequestPages,
        pace: SlotPace,
        is_in_host: Callable[[str], bool],
    ) -> None:
        """is_in_host: whether an adapter is in host memory now."""
        self._slots = slots
        self._flows = flows
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

    def update_flows(self, now: float, num_places: float) -> SlotTurns:
        """Tell the flows what has come of loads since the last step, and how slots change hands from now on.

        num_places: of `SlotPace.turns`.
        """
        for digest in [digest for digest in self._loading_since if not self._slots.is_loading(digest)]:
            since = self._loading_since.pop(digest)
            if self._slots.slot_of(digest) is not None:
                self._pace.book(empty_s=now - since)
        self._flows.set_hot(self._slots.occupants())
        turns = self._pace.turns(num_places)
        self._flows.slot_line.set_turns(turns)
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

    def are_at_hand(self, flow: Flow) -> bool:
        """Whether all that a flow's adapter lacks is or was in host memory, which may lack room for several."""
        return all(digest in self._come or self._is_in_host(digest) for digest in self.missing(flow))

    def could_load(self, adapter: str) -> bool:
        """Whether what flows of `adapter` lack is in no slot, and all of that at hand."""
        flow = self._flows.first(adapter)
        return flow is not None and bool(self.missing(flow)) and self.are_at_hand(flow)

    def next_at_hand(self) -> list[Flow]:
        """Of the flows of cold adapters that are likely to be served next, those whose adapters are at hand."""
        firsts = map(self._flows.first, self._flows.next_cold(self._slots.num_slots + self._num_overdue))
        return [flow for flow in firsts if flow is not None and self.are_at_hand(flow)]

    def slots_of(self, digests: tuple[str, ...]) -> tuple[int, ...]:
        """The slots of adapters that are ready."""
        slots = [slot for digest in digests if (slot := self._slots.slot_of(digest)) is not None]
        assert len(slots) == len(digests)
        return tuple(slots)

    def are_ready(self, digests: tuple[str, ...]) -> bool:
        return all(self._slots.slot_of(digest) is not None for digest in digests)

    def missing(self, flow: Flow) -> list[str]:
        """Of the adapters that a flow needs, the cold ones."""
        return [digest for digest in flow.digests if self._is_cold(digest)]

    def held_since(self, digest: str) -> float:
        """When an adapter that is loading or pinned got its slot."""
        return self._held_since[digest]

    def was_held_at(self, digest: str, then: float) -> bool:
        """Whether a ready adapter has had its slot since `then`, or is idle."""
        return self._held_since.get(digest, then) <= then

    def start_load(self, flow: Flow, keep: set[str], now: float) -> bool:
        """Bring all that a flow's adapter lacks into slots, if they can be had. From here on it counts as served.

        keep: adapters that are not evicted for it.
        """
        missing = self.missing(flow)
        slots = self._slots.start_loads(missing, keep.union(flow.digests))
        if slots is None:
            return False
        self._started += [SlotLoad(digest, slot) for digest, slot in zip(missing, slots, strict=True)]
        self._held_since = {held: since for held, since in self._held_since.items() if not self._is_cold(held)}
        self._held_since.update(dict.fromkeys(missing, now))
        self._loading_since.update(dict.fromkeys(missing, now))
        for digest in missing:
            self._pace.book(ready_s=self._come.pop(digest, 0.0))
        request = flow.waiting[0]
        self._flows.charge_prompt(request, self._pages.num_found_tokens(request))
        self._flows.set_hot(self._slots.occupants())
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
        cold = self._flows.next_cold(self._slots.num_slots + self._num_overdue)
        digests = [digest for adapter in [*adapters, *cold] for digest in self._flows.digests_of(adapter)]
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

    def acquire(self, request: Request, now: float) -> None:
        """A request runs, and its adapters stay in their slots."""
        for digest in request.digests:
            self._slots.acquire(digest)
            self._held_since.setdefault(digest, now)

    def release(self, request: Request) -> None:
        for digest in request.digests:
            self._slots.release(digest)
            if not self._slots.is_in_use(digest):
                del self._held_since[digest]

    def _is_wanted(self, digest: str) -> bool:
        return self._is_cold(digest) and self._flows.wants(digest)

    def _is_cold(self, digest: str) -> bool:
        return self._slots.slot_of(digest) is None and not self._slots.is_loading(digest)

    def check_integrity(self, running: Sequence[Request]) -> None:
        """Those that run have their adapters' uses, and nobody else has one. Between steps. For tests."""
        self._slots.check_integrity()
        uses = Counter(digest for request in running for digest in request.digests)
        assert uses == self._slots._uses
        assert uses.keys() <= self._held_since.keys()
        assert not self._started
