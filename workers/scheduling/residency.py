"""Residency: the adapters that hold slots and since when, and the loads that bring the others into slots.

Only an adapter that is at hand, in host memory, gets a slot. So no slot stands empty for as long as a disk read takes,
and a read that hangs takes no slot. The next adapters in line are announced to the host tier, which reports when each
is there.

Owns: the times, the loads that a step starts, the announced adapters. Leaves to others: the choice of slot and victim
(adapter_slots.py), the flows that may have one (scheduler.py, preemption.py), those that must leave (claims.py).

A composition takes the slots of all its adapters or of none: the loads of all its cold adapters start at once, or not
at all, and the ready ones are kept for it only from then on. So no composition holds a slot while it waits for another.
It waits for loads, which end by themselves, or for seats and pages, whose holders wait for no slot. There is no
deadlock.
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

_OVERDUE = 2.0  # turns after which an announced adapter that has not come gives up its place to another
_SIDE_BY_SIDE = 4  # reads that a host tier makes in parallel, at least


class Residency:
    """Adapters are cold (in no slot), loading, or ready. Times are the caller's."""

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
        self._held_since: dict[str, float] = {}  # loading and ready adapters, but for idle ones → when they got theirs
        self._loading_since: dict[str, float] = {}
        self._started: list[SlotLoad] = []  # since the last `take_started`
        self._announced: dict[str, float] = {}  # adapters that were in a plan's prefetches and still wait → when
        # Adapters that came into host memory and have no slot yet → for how long each kept the host tier busy.
        self._come: dict[str, float] = {}
        self.num_come = 0  # so far
        self._num_overdue = 0  # of the announced adapters

    def update_flows(self, now: float, num_places: float) -> SlotTurns:
        """Tell the flows which adapters are loading or ready, and book loads that ended. Return the pace from now on.

        num_places: see `SlotPace.turns`.
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
        """Return the share of a turn in which its slot stands empty, since its adapter is loading."""
        return self._pace.empty_share

    def come(self, digest: str, now: float) -> None:
        """Report that an announced adapter is in host memory."""
        num_coming = sum(other not in self._come for other in self._announced)
        self._come[digest] = (now - self._announced.get(digest, now)) / max(num_coming, _SIDE_BY_SIDE)
        self.num_come += 1

    def has_come(self, digest: str) -> bool:
        """Return whether an adapter has come into host memory and waits for a slot. For any thread."""
        return digest in self._come

    def are_at_hand(self, flow: Flow) -> bool:
        """Return whether all cold adapters of a flow are, or were, in host memory, which may lack room for several."""
        return all(digest in self._come or self._is_in_host(digest) for digest in self.missing(flow))

    def could_load(self, adapter: str) -> bool:
        """Return whether flows of `adapter` have cold adapters, all of them at hand."""
        flow = self._flows.first(adapter)
        return flow is not None and bool(self.missing(flow)) and self.are_at_hand(flow)

    def next_at_hand(self) -> list[Flow]:
        """Return the cold flows that are likely to be served next and whose adapters are at hand."""
        firsts = map(self._flows.first, self._flows.next_cold(self._slots.num_slots + self._num_overdue))
        return [flow for flow in firsts if flow is not None and self.are_at_hand(flow)]

    def slots_of(self, digests: tuple[str, ...]) -> tuple[int, ...]:
        """Return the slots of adapters that are ready."""
        slots = [slot for digest in digests if (slot := self._slots.slot_of(digest)) is not None]
        assert len(slots) == len(digests)
        return tuple(slots)

    def are_ready(self, digests: tuple[str, ...]) -> bool:
        return all(self._slots.slot_of(digest) is not None for digest in digests)

    def missing(self, flow: Flow) -> list[str]:
        """Return the cold adapters of a flow."""
        return [digest for digest in flow.digests if self._is_cold(digest)]

    def held_since(self, digest: str) -> float:
        """Return when an adapter that is loading or in use got its slot."""
        return self._held_since[digest]

    def was_held_at(self, digest: str, then: float) -> bool:
        """Return whether a ready adapter has held its slot since `then`, or is idle."""
        return self._held_since.get(digest, then) <= then

    def start_load(self, flow: Flow, keep: set[str], now: float) -> bool:
        """Start the loads of all cold adapters of a flow, and charge its first request's prompt.

        False: the slots cannot be had. keep: adapters that are not evicted for it.
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
        """Return the loads that were started since the last call."""
        started, self._started = self._started, []
        return tuple(started)

    def announce(self, adapters: Iterable[str], now: float, turn_s: float) -> tuple[str, ...]:
        """Return the adapters to read into the host cache: those that must have slots, then those likely to be next.

        adapters: adapters and compositions that must have slots. At most one adapter a slot is announced, not counting
        those that are long overdue; each is returned once for as long as it is in line.
        """
        cold = self._flows.next_cold(self._slots.num_slots + self._num_overdue)
        digests = [digest for adapter in [*adapters, *cold] for digest in self._flows.digests_of(adapter)]
        next_up = dict.fromkeys(digest for digest in digests if self._is_cold(digest))  # a set in order
        announced: dict[str, float] = {}
        num_left = self._slots.num_slots
        self._num_overdue = 0
        for digest in next_up:
            since = self._announced.get(digest, now)
            is_overdue = digest not in self._come and now - since > _OVERDUE * turn_s and not self._is_in_host(digest)
            self._num_overdue += is_overdue
            num_left -= not is_overdue
            if num_left < 0:
                break
            announced[digest] = since
        fresh = tuple(digest for digest in announced if digest not in self._announced)
        self._announced = announced
        for digest in [digest for digest in self._come if not self._is_wanted(digest)]:
            del self._come[digest]
        return fresh

    def acquire(self, request: Request, now: float) -> None:
        """Keep the adapters of a request that runs in their slots."""
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
        """Check that the uses of adapters are those of running requests. Between steps. For tests."""
        self._slots.check_integrity()
        uses = Counter(digest for request in running for digest in request.digests)
        assert uses == self._slots._uses
        assert uses.keys() <= self._held_since.keys()
        assert not self._started
