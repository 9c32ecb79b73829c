"""Who gives way: when pages run out, and for those that could not be served in time otherwise.

Decides whom `Running` preempts. Leaves to others: when somebody's time is running out (turns.py), and those that need
nobody to give way (scheduler.py). Times are the caller's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from lorafleet.workers.scheduling.adapter_slots import AdapterSlots
from lorafleet.workers.scheduling.budget import TurnBudget
from lorafleet.workers.scheduling.flows import Flow, Flows
from lorafleet.workers.scheduling.request import Request
from lorafleet.workers.scheduling.request_pages import RequestPages
from lorafleet.workers.scheduling.residency import Residency
from lorafleet.workers.scheduling.running import Running
from lorafleet.workers.scheduling.turns import WaitBound


@dataclass(slots=True)
class Reserved:
    """What those that must have a turn still lack, and others therefore cannot have in this step."""

    adapters: list[str]  # that must have a slot, longest wait first
    keep: set[str]  # adapters of all that must have a turn: they are not evicted
    fresh: set[str] = field(default_factory=set)  # adapters that no turn is taken from yet, though nobody uses them
    claimed: set[str] = field(default_factory=set)  # adapters that take nobody new
    is_gathering: bool = False  # slots come free for a composition: nobody else may take them
    lacks_pages: bool = False  # someone waits for pages: nobody else may take them
    lacks_seats: bool = False  # someone waits for a seat: nobody else may take one that is not the base model's


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
        bound: WaitBound,
    ) -> None:
        self._slots = slots
        self._flows = flows
        self._pages = pages
        self._residency = residency
        self._running = running
        self._bound = bound
        self._budget = TurnBudget(bound.num_seats, bound.turn_s)
        self._taken: dict[int, float] = {}  # slots that were taken for turns → how many requests they served before
        self._estimate = 0.0  # seats that a turn in another slot would leave empty
        self._estimated_at = -math.inf  # a look at all slots costs more than a step decides otherwise
        self._num_shut_out = 0  # requests that wait for adapters that take nobody new

    def free_pages(self) -> Request:
        """Preempt the request that ranks last, for its pages."""
        victim = max((request for request in self._running if request.has_progressed), key=self._flows.rank_of)
        self._running.preempt(victim)
        return victim

    def book(self, now: float, redone: float) -> float:
        """Book what turns have cost since the last step; in how many slots they may be taken.

        redone: of what that step computed, the part that those that gave way had computed before.
        """
        num_places = self._bound.places_left(self._slots.num_pinned)
        if not self._bound.max_wait_s:
            return num_places
        if now >= self._estimated_at + self._bound.turn_s / 16:
            self._estimated_at = now
            num_users = self._slots.usual_uses * (1 + self._residency.empty_share)
            num_filling = max(0, self._flows.num_warm - self._running.num_free_seats)
            self._estimate = max(0.0, num_users - self._flows.mean_cold - num_filling)
        self._budget.book(
            now, num_running=len(self._running), num_lost=self._lost_seats(), redone=redone, cost=self._estimate
        )
        return self._budget.places(num_places)

    def _lost_seats(self) -> int:
        """Seats that stand empty for those that gave way, or were not let in.

        At most as many as their slots serve less than before.
        """
        num_less = 0.0
        if not self._running.preempted_for_turns:
            self._taken.clear()
        if self._taken:
            num_served = self._num_served(self._running)
            self._taken = {slot: num for slot, num in self._taken.items() if num_served[slot] < num}
            num_less = sum(num - num_served[slot] for slot, num in self._taken.items())
        num_waiting = min(round(num_less), self._running.preempted_for_turns.total()) + self._num_shut_out
        return min(self._running.num_free_seats, num_waiting)

    def _num_served(self, requests: Iterable[Request]) -> dict[int, float]:
        """How many of these requests each slot serves; of one that uses two slots, each a half."""
        num_served: dict[int, float] = defaultdict(float)
        for request in requests:
            for slot in self._residency.slots_of(request.digests):
                num_served[slot] += 1 / len(request.digests)
        return num_served

    def give_turns(self, now: float, hold_s: float) -> Reserved:
        """Give places to those whose time is running out. Who has run for less than a turn is left alone.

        hold_s: how long a slot is kept at least.
        """
        adapters = self._flows.slot_line.due(now, self._can_have_turn)
        due = self._due(adapters, now)
        reserved = Reserved(adapters, {digest for flow in due for digest in flow.digests})
        gives_back = self._budget.is_overdrawn and self._lost_seats() > 0
        if due or gives_back:
            reserved.fresh = self._fresh(now - hold_s)
        for flow in due:
            if self._residency.are_ready(flow.digests):
                self._start(flow, reserved, now)
            else:
                self._load(flow, reserved, now, now - hold_s)
        if gives_back and not reserved.is_gathering:
            self._give_back(reserved, now, now - hold_s)
        self._num_shut_out = sum(map(self._flows.num_waiting_for, reserved.claimed))
        return reserved

    def _can_have_turn(self, adapter: str) -> bool:
        """Whether all that its flows need is at hand; while too much is lost, only those that gave way."""
        flow = self._flows.first(adapter)
        is_affordable = not self._budget.is_overdrawn or self._running.preempted_for_turns[adapter] > 0
        return flow is not None and is_affordable and self._residency.are_at_hand(flow)

    def _fresh(self, before: float) -> set[str]:
        """Adapters that came into their slots after `before`, and whose requests have not had the time to start."""
        hot = {digest for digests in self._flows.hot().values() for digest in digests}
        return {
            digest
            for digest in hot
            if not self._slots.is_in_use(digest) and not self._residency.was_held_at(digest, before)
        }

    def _due(self, adapters: list[str], now: float) -> list[Flow]:
        """Of the flows of adapters that must have a slot the first ones, those that must have a seat, the others."""
        served = [self._flows.served_by_turn(adapter) for adapter in adapters]
        due = dict.fromkeys(first for first, *_ in served)  # a set in order
        for flow in self._flows.seat_line.due(now):
            if self._residency.are_ready(flow.digests):
                due[flow] = None
        due |= dict.fromkeys(flow for _, *others in served for flow in others)
        return list(due)

    def _start(self, flow: Flow, reserved: Reserved, now: float) -> None:
        """Start a flow's next request before all others, in place of running ones if need be.

        Nobody gives way if it would not suffice.
        """
        request = flow.waiting[0]
        others = self._preemptible(flow, now - self._bound.turn_s)
        num_kept = 0 if flow.adapter is None else self._flows.num_kept_seats
        if self._running.num_free_seats + len(others) <= num_kept:
            reserved.lacks_seats = True
            return
        reserved.lacks_pages |= not self._pages.could_place(request, without=others)
        if reserved.lacks_pages:
            return
        while self._running.num_free_seats <= num_kept or not self._running.start(request, now, is_urgent=True):
            if not others or (self._running.num_free_seats > num_kept and self._budget.is_overdrawn):
                reserved.lacks_pages = True
                return
            self._running.preempt(others.pop(), for_turn=True)

    def _preemptible(self, flow: Flow, before: float) -> list[Request]:
        """Requests that have run since `before`, best rank first; for an adapter's flow not the base model's part."""
        others = [other for other in self._running if other.has_progressed and other.started_at <= before]
        others.sort(key=self._flows.rank_of)
        if flow.adapter is None:
            return others
        seats = self._flows.base_seats
        num_more = max(0, seats.num_running - seats.part)
        base = [other for other in others if other.adapter is None]
        stay = set(base[: max(0, len(base) - num_more)])
        return [other for other in others if other not in stay]

    def _load(self, flow: Flow, reserved: Reserved, now: float, before: float) -> None:
        """Load what a flow's adapter lacks, in place of adapters whose requests give way if need be.

        If too few have held their slots since `before`, as many as it lacks take nobody new, those first that have had
        theirs the longest.
        """
        missing = self._residency.missing(flow)
        if not missing or reserved.is_gathering:
            return
        keep = reserved.keep if self._is_owed(flow, now) else reserved.keep | reserved.fresh
        while not self._residency.start_load(flow, keep, now):
            others = [other for other in self._slots.obstacles(missing[0]) if other not in keep]
            num_lacking = max(1, self._slots.num_lacking(len(missing), keep))
            held = self._users(others, before)
            if len(held) >= num_lacking:
                victims = self._affordable(flow, held, num_lacking, now)
                if victims is None:
                    return
                self._budget.take()
                self._free_slots(victims, held)
                continue
            if self._budget.is_overdrawn and not self._is_owed(flow, now):
                return
            unclaimed = [other for other in others if other not in reserved.claimed]
            reserved.claimed.update(sorted(unclaimed, key=self._residency.held_since)[:num_lacking])
            if len(missing) > 1:
                reserved.is_gathering = True
                idle = [other for other in self._slots.blockers(missing[0]) if not self._slots.is_in_use(other)]
                reserved.claimed.update(other for other in idle if other not in reserved.keep)
            return

    def _give_back(self, reserved: Reserved, now: float, before: float) -> None:
        """Load the adapter that most requests wait for that gave way, in place of one that fewer use if need be."""
        preempted = self._running.preempted_for_turns
        cold = [adapter for adapter in preempted if adapter is not None and self._residency.could_load(adapter)]
        flow = self._flows.first(max(cold, key=preempted.__getitem__)) if cold else None
        if flow is None:
            return
        reserved.keep.update(flow.digests)
        keep = reserved.keep | reserved.fresh
        while not self._residency.start_load(flow, keep, now):
            missing = self._residency.missing(flow)
            others = [other for other in self._slots.obstacles(missing[0]) if other not in keep]
            num_lacking = max(1, self._slots.num_lacking(len(missing), keep))
            held = self._users(others, before)
            victims = sorted(held, key=lambda digest: len(held[digest]))[:num_lacking]
            num_users = len({request for digest in victims for request in held[digest]})
            if len(victims) < num_lacking or num_users >= preempted[flow.adapter]:
                return
            self._free_slots(victims, held)

    def _users(self, adapters: list[str], before: float) -> dict[str, list[Request]]:
        """The running requests of the adapters that have held their slots since `before`, that which ranks last at the
        end.

        An adapter with a request that has got no token yet is left alone.
        """
        held = {digest for digest in adapters if self._residency.held_since(digest) <= before}
        users: dict[str, list[Request]] = {}
        for request in self._running:
            for digest in request.digests:
                if digest in held:
                    users.setdefault(digest, []).append(request)
        ranks = {
            digest: min(map(self._flows.rank_of, requests))
            for digest, requests in users.items()
            if all(request.has_progressed for request in requests)
        }
        return {digest: users[digest] for digest in sorted(ranks, key=ranks.__getitem__)}

    def _affordable(self, flow: Flow, users: dict[str, list[Request]], num_slots: int, now: float) -> list[str] | None:
        """Whose slots a flow's adapter is to have: those that rank last, or if that costs, the least used.

        None if that costs too much. What has begun is not refused any more, so it gets its turn in time all the same.
        """
        victims = list(users)[-num_slots:]
        cost = self._cost(flow, users, victims)
        if cost > 0:
            victims = sorted(users, key=lambda digest: len(users[digest]))[:num_slots]
            cost = self._cost(flow, users, victims)
        if self._budget.allows(self._lost_seats(), cost):
            return victims
        return victims if self._is_owed(flow, now) else None

    def _is_owed(self, flow: Flow, now: float) -> bool:
        """Whether a flow's turn must come now, whatever it costs: a request of its has begun, and is not refused."""
        is_last_moment = flow.since <= self._flows.slot_line.latest(now)
        return is_last_moment and any(request.num_output_tokens for request in flow.waiting)

    def _cost(self, flow: Flow, users: dict[str, list[Request]], victims: list[str]) -> int:
        """How many more seats would stand empty if a flow's adapter had the slots of others."""
        leaving = {request for digest in victims for request in users[digest]}
        num_waiting = self._flows.num_warm - sum(map(self._flows.num_waiting_for, victims))
        num_filling = max(0, num_waiting - self._running.num_free_seats)
        cost = len(leaving) - self._flows.num_waiting_for(flow.adapter)
        return max(0, cost - num_filling) if cost > 0 else cost

    def _free_slots(self, victims: list[str], users: dict[str, list[Request]]) -> None:
        for digest in victims:
            (slot,) = self._residency.slots_of((digest,))
            num_served = sum(1 / len(request.digests) for request in users[digest])
            self._taken[slot] = max(self._taken.get(slot, 0.0), num_served)
            for request in users[digest]:
                if request.pages:  # a composition may be preempted for several
                    self._running.preempt(request, for_turn=True)
