"""Who gives way: when pages run out, and for those that could not be served in time otherwise.

Decides whom `Running` preempts. Leaves to others: when somebody's time is running out (turns.py), and those that need
nobody to give way (scheduler.py). Times are the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lorafleet.workers.scheduling.adapter_slots import AdapterSlots
from lorafleet.workers.scheduling.flows import Flow, Flows
from lorafleet.workers.scheduling.request import Request
from lorafleet.workers.scheduling.request_pages import RequestPages
from lorafleet.workers.scheduling.residency import Residency
from lorafleet.workers.scheduling.running import Running


@dataclass(slots=True)
class Reserved:
    """What those that must have a turn still lack, and others therefore cannot have in this step."""

    adapters: list[str]  # that must have a slot, longest wait first
    keep: set[str]  # adapters of all that must have a turn: they are not evicted
    claimed: set[str] = field(default_factory=set)  # adapters that take nobody new
    is_gathering: bool = False  # slots come free for a composition: nobody else may take them
    is_blocked: bool = False  # someone waits for a seat or pages: nobody else may take them


class Preemption:
    """Those give way that rank last, of the requests that have got a token since they began to run."""

    def __init__(
        self,
        slots: AdapterSlots,
        flows: Flows,
        pages: RequestPages,
        residency: Residency,
        running: Running,
        *,
        turn_s: float,
    ) -> None:
        """turn_s: how long a seat is kept at least."""
        self._slots = slots
        self._flows = flows
        self._pages = pages
        self._residency = residency
        self._running = running
        self._turn_s = turn_s

    def free_pages(self) -> Request:
        """Preempt the request that ranks last, for its pages."""
        victim = max((request for request in self._running if request.has_progressed), key=self._flows.rank_of)
        self._running.preempt(victim)
        return victim

    def give_turns(self, now: float) -> Reserved:
        """Give places to those whose time is running out. Who has run for less than a turn is left alone."""
        adapters = self._flows.slot_line.due(now, self._residency.could_run)
        due = self._due(adapters, now)
        reserved = Reserved(adapters, {digest for flow in due for digest in flow.digests})
        for flow in due:
            if self._residency.are_ready(flow.digests):
                reserved.is_blocked |= not self._start(flow, now)
            else:
                self._load(flow, reserved, now)
        return reserved

    def _due(self, adapters: list[str], now: float) -> list[Flow]:
        """Of the flows of adapters that must have a slot the first ones, those that must have a seat, the others."""
        served = [self._flows.served_by_turn(adapter) for adapter in adapters]
        due = dict.fromkeys(first for first, *_ in served)  # a set in order
        for flow in self._flows.seat_line.due(now):
            if self._residency.are_ready(flow.digests):
                due[flow] = None
        due |= dict.fromkeys(flow for _, *others in served for flow in others)
        return list(due)

    def _start(self, flow: Flow, now: float) -> bool:
        """Start a flow's next request before all others, in place of running ones if need be.

        Nobody gives way if it would not suffice.
        """
        request = flow.waiting[0]
        before = now - self._turn_s
        others = [other for other in self._running if other.has_progressed and other.started_at <= before]
        others.sort(key=self._flows.rank_of)
        if not self._pages.could_place(request, without=others):
            return False
        while not self._running.num_free_seats or not self._running.start(request, now, is_urgent=True):
            if not others:
                return False
            self._running.preempt(others.pop())
        return True

    def _load(self, flow: Flow, reserved: Reserved, now: float) -> None:
        """Load what a flow's adapter lacks, in place of adapters whose requests give way if need be.

        If that would not suffice, as many as it lacks take nobody new, those first that have their slots the longest.
        """
        missing = self._residency.missing(flow)
        if not missing or reserved.is_gathering:
            return
        while not self._residency.start_load(flow, reserved.keep, now):
            others = [other for other in self._slots.obstacles(missing[0]) if other not in reserved.keep]
            num_lacking = max(1, self._slots.num_lacking(len(missing), reserved.keep))
            if self._free_slots(others, num_lacking, now):
                continue
            unclaimed = [other for other in others if other not in reserved.claimed]
            reserved.claimed.update(sorted(unclaimed, key=self._residency.held_since)[:num_lacking])
            if len(missing) > 1:
                reserved.is_gathering = True
                idle = [other for other in self._slots.blockers(missing[0]) if not self._slots.is_pinned(other)]
                reserved.claimed.update(other for other in idle if other not in reserved.keep)
            return

    def _free_slots(self, adapters: list[str], num_slots: int, now: float) -> bool:
        """Take the slots from the adapters whose requests rank last, of those that have held theirs for a turn.

        An adapter with a request that has got no token yet is left alone. False, and nothing is taken: there are fewer.
        """
        before = now - self._flows.slot_line.turn_s
        held = {digest for digest in adapters if self._residency.held_since(digest) <= before}
        running: dict[str, list[Request]] = {}
        for request in self._running:
            for digest in request.digests:
                if digest in held:
                    running.setdefault(digest, []).append(request)
        ranks = {
            digest: min(map(self._flows.rank_of, requests))
            for digest, requests in running.items()
            if all(request.has_progressed for request in requests)
        }
        if len(ranks) < num_slots:
            return False
        for digest in sorted(ranks, key=ranks.__getitem__)[-num_slots:]:
            for request in running[digest]:
                if request.pages:  # a composition may be preempted for several
                    self._running.preempt(request)
        return True
