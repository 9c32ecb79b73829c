"""The scheduler: chooses the requests of the next step, and for how many tokens each.

A step is a map {request: number of tokens}. A prompt, a piece of a prompt, a single decode token and the recomputation
after a preemption are the same thing with different numbers.

Example: a step has 8 tokens, A streams, and B arrives with a prompt of 20. The steps are {A: 1, B: 7}, {A: 1, B: 7},
{A: 1, B: 6}, and B's first token comes out of the third. Then C arrives, whose adapter is in no slot, and after it D,
whose adapter is A's. The only slot is in use, so D passes C and starts.

Requests start in the order of service (flows.py): by priority, then the tenant and its adapter that have received the
least, then arrival. A request passes one that ranks before it only if that one's adapter has no slot yet and its own
has. That keeps batches full, and it is bounded twice: an adapter that has been passed for a turn claims a slot, whose
adapter accepts no new requests until its running ones have finished (claims.py); and if `max_wait_s` is at risk,
running requests are preempted (preemption.py).

Slots come free one by one, but a composition takes all of its own at once (residency.py). So while a composition is
next in line, lower-ranked requests get no slots, and the adapters it claims (idle first) accept no new requests.

If several tenants have requests, a step is kept short and its tokens are shared between them (step_budget.py,
step_shares.py): streams that find no room get their token in the next step, and a tenant without a running prompt can
start one before another tenant's is done.

A lack of pages never leaves a step empty: only a request that has produced a token needs more pages, so it can be
preempted itself, and the last one finds all that it needs.

Owns: the requests from `add` to their end, and a step's budget. Leaves to others: the order (flows.py), pages
(request_pages.py), slots (residency.py), seats (running.py). Pure: its clock is injected; no threads, no tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lorafleet.workers.scheduling.adapter_slots import AdapterSlots
from lorafleet.workers.scheduling.batch import Scheduled, StepPlan, in_row_order
from lorafleet.workers.scheduling.block_pool import BlockPool
from lorafleet.workers.scheduling.claims import Claims
from lorafleet.workers.scheduling.flows import Flows
from lorafleet.workers.scheduling.preemption import Preemption, Reserved
from lorafleet.workers.scheduling.request import MAX_PRIORITY, FinishReason, Request
from lorafleet.workers.scheduling.request_pages import RequestPages
from lorafleet.workers.scheduling.residency import Residency
from lorafleet.workers.scheduling.running import Running
from lorafleet.workers.scheduling.start_order import StartOrder
from lorafleet.workers.scheduling.step_shares import NEWCOMERS, StepShares, Wanted
from lorafleet.workers.scheduling.turns import SlotPace, SlotTurns, WaitBound

_NEVER = (-1, -1, -1)


class Scheduler:
    """Plans step after step: `schedule`, then `advance` for each part of the plan, and `settle` or `remove`.

    One step, and no more, may be planned before the tokens of the previous one are known.
    """

    def __init__(
        self,
        pool: BlockPool,
        slots: AdapterSlots,
        *,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos_token_ids: frozenset[int],
        max_wait_s: float = 0.0,
        enable_prefix_caching: bool = True,
        is_in_host: Callable[[str], bool] = lambda _: True,
        max_shared_tokens: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """max_wait_s: the wait limit, the longest that a flow may get no token; 0 is no limit. is_in_host: whether an
        adapter can be copied into a slot now; the caller reports by `come` when one that a plan prefetches can be.
        max_shared_tokens: tokens of a step while several tenants have requests; None is `max_num_batched_tokens`.
        clock: seconds that never go back.
        """
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_shared_tokens = max_shared_tokens or (lambda: max_num_batched_tokens)
        self._eos_token_ids = eos_token_ids
        self._clock = clock
        self._now = clock()
        bound = WaitBound(max_wait_s, slots.num_slots, max_num_seqs)
        self._slots = slots
        self._flows = flows = Flows(bound)
        self._pages = pages = RequestPages(pool, page_size=page_size, enable_prefix_caching=enable_prefix_caching)
        self._residency = residency = Residency(slots, flows, pages, SlotPace(bound), is_in_host)
        self._running = running = Running(flows, pages, residency, max_num_seqs=max_num_seqs)
        self._claims = Claims(slots, flows, residency, turn_s=bound.turn_s)
        self._preemption = Preemption(slots, flows, pages, residency, running, bound=bound)
        self._requests: dict[str, Request] = {}
        self._bound = bound
        self.slot_turns = SlotTurns(bound.num_adapter_places, bound.turn_s, bound.turn_s)  # as measured of late
        self._look_again_s = bound.turn_s / 16
        self._last_look = _NEVER  # `_changes` at the last look that left no request that could start
        self._last_look_at = self._now
        self._give_up_s = max_wait_s - bound.turn_s / 4
        self._overdue_at = self._now  # when to look again for overdue requests
        self._num_steps = 0  # planned
        self._num_postponed = 0  # tokens of running prompts, left to later steps
        self._redone = 0.0  # the share of the last step's tokens that had been computed before

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return self._flows.num_waiting

    @property
    def num_uncomputed_tokens(self) -> int:
        """Return the tokens that steps after the planned one must compute: prompts, and preempted requests again."""
        return self._flows.num_waiting_tokens + self._num_postponed

    @property
    def num_served_flows(self) -> int:
        """Return the number of flows (a tenant's requests for one adapter) with running requests."""
        return self._flows.num_served_flows

    @property
    def num_served_turns(self) -> int:
        """Return the turns that served flows take; `AdmissionControl` does not count them as waiting."""
        return self._flows.num_served_turns

    @property
    def num_base_seats(self) -> int:
        """Return the number of seats that adapters' turns leave to the base model."""
        return self._flows.base_seats.part

    @property
    def num_preemptions(self) -> int:
        return self._running.num_preemptions

    @property
    def num_prefix_query_tokens(self) -> int:
        """Return the tokens that were known when requests started, for the first time or again."""
        return self._running.num_prefix_query_tokens

    @property
    def num_prefix_hit_tokens(self) -> int:
        """Return how many of the query tokens needed no computing."""
        return self._running.num_prefix_hit_tokens

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def holds(self, request: Request) -> bool:
        """Return whether this request has not ended; another one may have its id."""
        return self._requests.get(request.request_id) is request

    def add(self, request: Request) -> None:
        assert request.request_id not in self._requests
        assert self._pages.can_ever_hold(request.num_prompt_tokens + request.sampling.max_tokens)
        self._requests[request.request_id] = request
        self._flows.add(request, self._clock())

    def remove(self, request_id: str, *, is_spoiled: bool = False) -> bool:
        """Remove a request that waits or runs, and free everything it holds. False: it is not here (any more).

        is_spoiled: its pages must not be found by others.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        self._running.remove(request, is_spoiled=is_spoiled)
        return True

    def need_of(self, digest: str) -> int:
        """Return how much an adapter is needed in host memory: 2 if a request for it has begun, 1 if it is in a slot
        or was read for one, else 0. For any thread.
        """
        if self._running.have_begun(digest):
            return 2
        return int(self._residency.has_come(digest) or self._slots.slot_of(digest) is not None)

    def come(self, digest: str) -> None:
        """Report that an adapter which a plan prefetched is in host memory."""
        self._residency.come(digest, self._clock())

    def waiting_for(self, digest: str) -> list[str]:
        """Return the ids of waiting requests that name this adapter."""
        return [request.request_id for request in self._flows.waiting_for(digest)]

    @property
    def is_overdue(self) -> bool:
        """Return whether `overdue` may return some now."""
        max_wait_s, now = self._bound.max_wait_s, self._clock()
        return max_wait_s > 0 and now >= max(self._overdue_at, self._flows.seat_line.first_since + self._give_up_s)

    def overdue(self) -> list[str]:
        """Return the ids of requests that can no longer be served in time.

        Their flows have received nothing for `max_wait_s` less a quarter of a turn. A request that has begun is never
        among them: it resumes.
        """
        if not self.is_overdue:
            return []
        now = self._clock()
        self._overdue_at = now + self._look_again_s
        return [request.request_id for request in self._flows.overdue(now - self._give_up_s)]

    def schedule(self) -> StepPlan:
        """Choose the next step: running requests first, then waiting ones."""
        self._now = self._clock()
        num_places = self._preemption.book(self._now, self._redone)
        self.slot_turns = self._residency.update_flows(self._now, num_places)
        reserved = self._preemption.give_turns(self._now, self.slot_turns.hold_s)
        self._num_steps += 1
        scheduled: dict[Request, int] = {}
        rows, prompts = self._running_requests()
        shares = self._shares(rows, prompts)
        preempted = self._continue_running(rows, prompts, scheduled, shares)
        may_start = not preempted and not reserved.lacks_pages
        if shares.are_shared:
            if may_start and shares.room(NEWCOMERS):
                self._start_newcomers(prompts, scheduled, shares, reserved)
            self._use_up(rows, prompts, scheduled, shares)
        prefetches: tuple[str, ...] = ()
        if reserved.keep or not scheduled or self._has_news():
            if may_start:
                self._start_waiting(scheduled, shares, reserved)
            due = self._flows.slot_line.due(self._now)
            prefetches = self._residency.announce(due, self._now, self.slot_turns.turn_s)
        num_redone = sum(num for request, num in scheduled.items() if num > 1 and request.was_preempted_for_turn)
        self._redone = num_redone / sum(scheduled.values()) if num_redone else 0.0
        slots_of = self._residency.slots_of
        entries = [Scheduled(request, num, slots_of(request.digests)) for request, num in scheduled.items()]
        return StepPlan(in_row_order(entries), self._residency.take_started(), prefetches)

    def advance(self, entry: Scheduled) -> None:
        """Book one entry of the plan as computed. If it samples, its token is pending until `settle`."""
        request, samples = entry.request, entry.samples
        request.num_computed_tokens += entry.num_tokens
        self._hash_known(request)
        if samples:
            request.token_ids.append(0)
            request.num_pending_tokens += 1
            self._flows.charge_output(request, self._now)

    def settle(self, request: Request, token_id: int, *, is_complete: bool = False) -> FinishReason | None:
        """Replace the first pending token by its value. Return the reason if that ended the request.

        is_complete: the request's grammar allows nothing after it. With max_tokens 0 the value means nothing.
        """
        assert request.num_pending_tokens and request.request_id in self._requests
        request.token_ids[request.num_known_tokens] = token_id
        request.num_pending_tokens -= 1
        self._hash_known(request)
        sampling = request.sampling
        if not sampling.max_tokens:
            finish = FinishReason.LENGTH
        elif token_id in sampling.stop_token_ids or (token_id in self._eos_token_ids and not sampling.ignore_eos):
            finish = FinishReason.STOP
        elif is_complete:
            finish = FinishReason.COMPLETE
        elif request.num_known_tokens - request.num_prompt_tokens >= sampling.max_tokens:
            finish = FinishReason.LENGTH
        else:
            return None
        self.remove(request.request_id)
        return finish

    def commit(self, entry: Scheduled, token_id: int | None) -> FinishReason | None:
        """Call `advance` and, if the entry sampled a token, `settle`."""
        self.advance(entry)
        return None if token_id is None else self.settle(entry.request, token_id)

    def _hash_known(self, request: Request) -> None:
        self._pages.hash_full(request, min(request.num_computed_tokens, request.num_known_tokens))

    def _running_requests(self) -> tuple[list[Request], list[Request]]:
        """Return the running requests with one token to compute, and those with more: prompts, urgent ones first."""
        rows: list[Request] = []
        prompts: list[Request] = []
        for request in self._running:
            if not request.is_ending:  # else only its last token is pending
                (prompts if request.num_uncomputed_tokens > 1 else rows).append(request)
        prompts.sort(key=lambda request: not request.is_urgent)
        return rows, prompts

    def _shares(self, rows: list[Request], prompts: list[Request]) -> StepShares:
        if self._flows.num_tenants < 2:
            return StepShares(self._max_num_batched_tokens)
        rows.sort(key=lambda request: request.last_step)  # requests that found no room come first
        wanted: dict[str | None, Wanted] = {}
        for request in rows:
            wanted.setdefault(request.tenant, Wanted(request.tenant_weight)).num_rows += 1
        for request in prompts:
            entry = wanted.setdefault(request.tenant, Wanted(request.tenant_weight))
            entry.num_prompt_tokens += request.num_uncomputed_tokens
        num_tokens = min(self._max_shared_tokens(), self._max_num_batched_tokens)
        is_full = sum(entry.num_tokens for entry in wanted.values()) >= num_tokens
        tenants = {request.tenant for request in prompts}
        may_start = self._running.num_free_seats and self._has_news() and self._flows.has_waiting_beside(tenants)
        if is_full and may_start:
            wanted[NEWCOMERS] = Wanted(num_prompt_tokens=self._flows.num_waiting_tokens)
        return StepShares(num_tokens, wanted)

    def _continue_running(
        self, rows: list[Request], prompts: list[Request], scheduled: dict[Request, int], shares: StepShares
    ) -> bool:
        """Schedule running requests, single tokens before prompts. Return whether pages ran out.

        If they do, preempt the lowest-ranked request that has produced a token since it started.
        """
        grow = self._pages.grow
        preempted = False
        for request in rows:
            if not request.pages or shares.room_for_rows(request.tenant) <= 0:
                continue  # preempted by this loop, or left to the next step
            while not grow(request, request.num_tokens):
                preempted = True
                victim = self._preemption.free_pages()
                if victim in scheduled:
                    shares.take(victim.tenant, -scheduled.pop(victim))
                if victim is request:
                    break
            else:
                self._schedule_row(request, scheduled, shares)
        self._num_postponed = sum(request.num_uncomputed_tokens for request in prompts)
        for request in prompts:
            self._schedule_prompt(request, request.tenant, scheduled, shares)
        return preempted

    def _use_up(
        self, rows: list[Request], prompts: list[Request], scheduled: dict[Request, int], shares: StepShares
    ) -> None:
        """Give what tenants left of their shares to running requests that had too little."""
        shares.open()
        for request in rows:
            if not shares.num_left:
                return
            if request.pages and request not in scheduled and self._pages.grow(request, request.num_tokens):
                self._schedule_row(request, scheduled, shares)
        for request in prompts:
            self._schedule_prompt(request, request.tenant, scheduled, shares)

    def _has_news(self) -> bool:
        """Return whether another look at waiting requests might start one, or a load.

        In most steps it would not, and with thousands of adapters it costs more than all other decisions. Counters and
        time change without notice; a claim that they bring about (claims.py) is found up to a sixteenth of a turn late.
        """
        return self._changes() != self._last_look or self._now >= self._last_look_at + self._look_again_s

    def _changes(self) -> tuple[int, int, int]:
        return self._flows.num_changes, self._slots.num_changes, self._residency.num_come

    def _start_newcomers(
        self, prompts: list[Request], scheduled: dict[Request, int], shares: StepShares, reserved: Reserved
    ) -> None:
        """Start requests of tenants that have no running prompt, in the newcomers' share.

        A request waits if all running prompts have a better priority.
        """
        tenants = {request.tenant for request in prompts}
        last_priority = max((request.priority for request in prompts), default=MAX_PRIORITY)
        order = StartOrder(self._flows, self._ready(self._unclaimed(reserved), reserved), without=tenants)
        while self._running.num_free_seats and shares.room(NEWCOMERS) and (flow := order.first()) is not None:
            if reserved.lacks_seats and not self._flows.num_kept_seats:
                return
            request = flow.waiting[0]
            if request.num_pending_tokens or request.priority > last_priority or not self._start(request):
                return
            order.started(flow)
            prompts.append(request)
            self._schedule_prompt(request, NEWCOMERS, scheduled, shares)

    def _start_waiting(self, scheduled: dict[Request, int], shares: StepShares, reserved: Reserved) -> None:
        """Start waiting requests in the order of service until budget, seats or pages run out.

        A request whose adapter is in host memory but in no slot starts a load if a slot can be had; if none can, those
        that rank after it pass. While a turn lacks a seat, only the base model's requests start, in the seats kept for
        them.
        """
        flows = self._flows
        if not shares.num_left and flows.num_waiting and not any(self._residency.next_at_hand()):
            self._last_look = _NEVER
            return
        unclaimed = self._unclaimed(reserved)
        order = StartOrder(flows, self._ready(unclaimed, reserved))
        keep = reserved.keep.union(*unclaimed.values())
        has_slot = not (reserved.is_gathering or reserved.lacks_seats)
        while True:
            best = order.first()
            while has_slot and (cold := next(iter(self._residency.next_at_hand()), None)) is not None:
                if best is not None and flows.rank(best) < flows.rank(cold):
                    break
                has_slot = self._residency.start_load(cold, keep, self._now)
                if has_slot:
                    keep.update(cold.digests)
                elif any(map(self._slots.lacks_bytes, cold.digests)):
                    self._load_beside(keep)
            if best is not None and not shares.num_left:
                self._last_look = _NEVER
                return
            if best is None or not self._running.num_free_seats:
                break
            if reserved.lacks_seats and not flows.num_kept_seats:
                break
            request = best.waiting[0]
            if request.num_pending_tokens:  # preempted during a step; the next plan will find its token known
                self._last_look = _NEVER
                return
            if not self._start(request):
                break
            order.started(best)
            self._schedule_prompt(request, request.tenant, scheduled, shares)
        self._last_look, self._last_look_at = self._changes(), self._now

    def _unclaimed(self, reserved: Reserved) -> dict[str, tuple[str, ...]]:
        """Return the hot adapters that have waiting requests and accept them, with their digests."""
        hot = self._flows.hot()
        # A request preempted for a turn resumes as if it had never stopped: its adapters are not claimed.
        resuming = {digest for adapter in self._running.preempted_for_turns for digest in hot.get(adapter or "", ())}
        claimed = reserved.claimed | self._claims.find(
            hot, reserved.claimed | resuming, self._now, self.slot_turns.hold_s
        )
        return {adapter: digests for adapter, digests in hot.items() if claimed.isdisjoint(digests)}

    def _ready(self, unclaimed: dict[str, tuple[str, ...]], reserved: Reserved) -> list[str | None]:
        """Return the adapters whose requests may start now, and the base model."""
        if reserved.lacks_seats:
            return [None]
        return [None, *(adapter for adapter, digests in unclaimed.items() if self._residency.are_ready(digests))]

    def _load_beside(self, keep: set[str]) -> None:
        """Load cold adapters for which there is room, while the first in order waits for memory beside its slot."""
        for flow in self._residency.next_at_hand():
            if any(map(self._slots.lacks_bytes, flow.digests)) or not self._residency.missing(flow):
                continue
            if not self._residency.start_load(flow, keep, self._now):
                return
            keep.update(flow.digests)

    def _start(self, request: Request) -> bool:
        """Start a waiting request whose adapters are ready. False: too few pages are free."""
        if not self._running.start(request, self._now):
            return False
        self._num_postponed += request.num_uncomputed_tokens
        return True

    def _schedule_row(self, request: Request, scheduled: dict[Request, int], shares: StepShares) -> None:
        scheduled[request] = 1
        shares.take(request.tenant, 1)
        request.last_step = self._num_steps

    def _schedule_prompt(
        self, request: Request, holder: str | None, scheduled: dict[Request, int], shares: StepShares
    ) -> None:
        """Schedule as many more of a request's tokens as fit. holder: whose share they are taken from.

        Its full pages are hashed at once: a step writes all keys and values of a layer before it reads any, so a
        request that starts later in this step may use them.
        """
        num_before = scheduled.get(request, 0)
        num_more = min(request.num_uncomputed_tokens - num_before, shares.room(holder))
        if not num_more:
            return
        scheduled[request] = num_before + num_more
        shares.take(holder, num_more)
        self._num_postponed -= num_more
        self._pages.hash_full(request, request.num_computed_tokens + num_before + num_more)

    def check_integrity(self) -> None:
        """Check that every request waits or runs, holds what it should, and nothing else is held. For tests."""
        waiting = self._flows.check_integrity(list(self._running))
        ids = [request.request_id for request in [*self._running, *waiting]]
        assert sorted(ids) == sorted(self._requests)
        self._running.check_integrity(waiting)
