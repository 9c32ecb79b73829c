"""Preemption: chooses running requests to stop, if pages run out or a flow is near its wait limit.

Example: two slots hold X with one running request and Y with two; a seat is free, and turns take 1 s. Z's only request
waits, with a wait limit of 20 s. After 18 s its turn must begin. Y ranks last, but in its slot two requests would leave
and one would start, so one more seat would be empty. X's slot costs nothing: X's request is preempted and Z loads. X is
in line again. It resumes in a slot that comes free, or by a turn within its own wait limit.

Decides which requests `Running` preempts. Leaves to others: when a flow must have a turn (turns.py), what turns may
cost (budget.py), requests that start without preempting any (scheduler.py). Times are the caller's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field

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
    """The places that due flows still lack, and that other flows therefore cannot take in this step."""

    adapters: list[str]  # those that must have a slot, longest wait first
    keep: set[str]  # adapters of all due flows: they are not evicted
    _: KW_ONLY
    fresh: set[str] = field(default_factory=set)  # adapters that keep their slots for now, though no request uses them
    claimed: set[str] = field(default_factory=set)  # adapters that accept no new requests
    is_gathering: bool = False  # slots come free for a composition: no other flow may take them
    lacks_pages: bool = False  # a due flow waits for pages: no other may take them
    lacks_seats: bool = False  # a due flow waits for a seat: others may only take the base model's


class Preemption:
    """Preempts the lowest-ranked requests that have produced a token since they started."""

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
        self._taken: dict[int, float] = {}  # slots taken for turns → how many requests they served before
        self._estimate = 0.0  # seats that one more turn would leave empty
        self._estimated_at = -math.inf  # a look at all slots costs more than all other decisions of a step
        self._num_shut_out = 0  # requests that wait for claimed adapters

    def free_pages(self) -> Request:
        """Preempt the request that ranks last, for its pages, and return it."""
        victim = max((request for request in self._running if request.has_progressed), key=self._flows.rank_of)
        self._running.preempt(victim)
        return victim

    def book(self, now: float, redone: float) -> float:
        """Book what turns have cost since the last step. Return in how many slots they may be taken.

        redone: the share of that step's tokens that preempted requests had computed before.
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
        places = self._budget.places(num_places)
        if self._running.preempted_for_turns:
            return places
        return max(places, num_places - self._slots.num_in_use)  # no turn is needed for slots that no request uses

    def _lost_seats(self) -> int:
        """Return the seats that stand empty because their requests were preempted, or not started, for turns.

        Of preempted requests, at most as many count as their slots serve less than before.
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
        """Return how many of these requests each slot serves; one that uses two slots counts a half in each."""
        num_served: dict[int, float] = defaultdict(float)
        for request in requests:
            for slot in self._residency.slots_of(request.digests):
                num_served[slot] += 1 / len(request.digests)
        return num_served

    def give_turns(self, now: float, hold_s: float) -> Reserved:
        """Give places to the flows that are due. A request that has run for less than a turn is not preempted.

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
        """Return whether an adapter's flows have all they need in host memory, and the budget allows their turn.

        While the budget is overdrawn, only adapters with preempted requests have turns.
        """
        flow = self._flows.first(adapter)
        is_affordable = not self._budget.is_overdrawn or self._running.preempted_for_turns[adapter] > 0
        return flow is not None and is_affordable and self._residency.are_at_hand(flow)

    def _fresh(self, before: float) -> set[str]:
        """Return adapters that got their slots after `before` and whose requests had no time to start.

        With them, adapters in slots that the same requests use.
        """
        hot = self._flows.hot().values()
        fresh = {
            digest
            for digests in hot
            for digest in digests
            if not self._slots.is_in_use(digest) and not self._residency.was_held_at(digest, before)
        }
        return fresh.union(*(digests for digests in hot if not fresh.isdisjoint(digests)))

    def _due(self, adapters: list[str], now: float) -> list[Flow]:
        """Return the flows to serve now: the first of each due adapter, those due a seat, the due adapters' others."""
        served = [self._flows.served_by_turn(adapter) for adapter in adapters]
        due = dict.fromkeys(first for first, *_ in served)  # a set in order
        for flow in self._flows.seat_line.due(now):
            if self._residency.are_ready(flow.digests):
                due[flow] = None
        due |= dict.fromkeys(flow for _, *others in served for flow in others)
        return list(due)

    def _start(self, flow: Flow, reserved: Reserved, now: float) -> None:
        """Start a flow's next request before all others, in place of running ones if need be.

        None is preempted if that would not suffice.
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
        """Return requests that have run since `before`, best rank first.

        For an adapter's flow, requests in the base model's part of the seats are left out.
        """
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
        """Load the adapters that a flow lacks, in place of adapters whose requests are preempted if need be.

        If too few have held their slots since `before`, claim as many as it lacks, the longest held first.
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
                reserved.claimed.update(other for other in idle if other not in keep)
            return

    def _give_back(self, reserved: Reserved, now: float, before: float) -> None:
        """Load the adapter with the most preempted requests, in place of one that fewer requests use if need be."""
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
        """Return the running requests of each adapter that has held its slot since `before`, the lowest-ranked last.

        An adapter is left out if one of its requests has not produced a token yet.
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
        """Return the adapters whose slots a flow gets: the lowest-ranked or, if that costs seats, the least used.

        None if that costs too much. A flow with a request that has begun gets its turn in time all the same.
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
        """Return whether a flow's turn must begin now at any cost: a request of it has begun and is never refused."""
        is_last_moment = flow.since <= self._flows.slot_line.latest(now)
        return is_last_moment and any(request.num_output_tokens for request in flow.waiting)

    def _cost(self, flow: Flow, users: dict[str, list[Request]], victims: list[str]) -> int:
        """Return how many more seats would stand empty if a flow's adapter had the slots of others."""
        leaving = {request for digest in victims for request in users[digest]}
        num_waiting = self._flows.num_warm - sum(map(self._flows.num_waiting_for, victims))
        num_filling = max(0, num_waiting - self._running.num_free_seats)
        cost = len(leaving) - self._flows.num_waiting_for(flow.adapter)
        return max(0, cost - num_filling) if cost > 0 else cost

    def _free_slots(self, victims: list[str], users: dict[str, list[Request]]) -> None:
        """Preempt all requests of these adapters."""
        for digest in victims:
            (slot,) = self._residency.slots_of((digest,))
            num_served = sum(1 / len(request.digests) for request in users[digest])
            self._taken[slot] = max(self._taken.get(slot, 0.0), num_served)
            for request in users[digest]:
                if request.pages:  # a composition may use several of these slots
                    self._running.preempt(request, for_turn=True)
