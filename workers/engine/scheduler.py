"""Who runs in the next step, and for how many tokens. Pure: its clock is injected; no threads, no tensors.

One quantity decides everything: {request: number of tokens this step}. A prompt, a piece of a prompt, a single decode
token and the recomputation after a preemption are the same thing with different numbers.

Requests are let in in the order of service (clients.py): priority, then the tenant and its adapter that have had
least, then arrival. One thing lets a request pass one that ranks before it: that one's adapter has no slot yet and its
own has. That keeps batches full, and it is bounded twice. An adapter that has been passed for a turn claims a slot,
whose adapter then takes nobody new until its running requests are done (claims.py). And where `max_wait_s` is at risk,
running requests give way (preemption.py).

Slots come free one by one, but a composition takes all of its own at once (residency.py): while one is the first that
waits for slots, nobody that ranks behind it gets one, and those that it claims take nobody new, idle ones first.

No step is left with nobody to run for want of pages: only a request that has got a token needs more of them, so it may
give way itself, and the last one finds all that it needs.

Owns: the requests from `add` to their end, and a step's budget. Leaves to others: the order (clients.py), pages
(request_pages.py), slots (residency.py), seats (running.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lorafleet.workers.engine.adapter_slots import AdapterSlots
from lorafleet.workers.engine.batch import Scheduled, StepPlan, in_row_order
from lorafleet.workers.engine.block_pool import BlockPool
from lorafleet.workers.engine.claims import Claims
from lorafleet.workers.engine.clients import Clients
from lorafleet.workers.engine.preemption import Preemption, Reserved
from lorafleet.workers.engine.request import FinishReason, Request
from lorafleet.workers.engine.request_pages import RequestPages
from lorafleet.workers.engine.residency import Residency
from lorafleet.workers.engine.running import Running
from lorafleet.workers.engine.turns import SlotPace, SlotTurns, WaitBound

_NEVER = (-1, -1, -1)


class Scheduler:
    """Plans step after step: `schedule`, then `advance` for each part of the plan, and `settle` or `remove`.

    The next step may be planned before the tokens of the one before it are known, but only one.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """max_wait_s: how long a client may get no token; 0 is no bound. is_in_host: whether an adapter can be copied
        into a slot now; of those that cannot, those that plans name in `prefetches` are to be reported by `come`.
        clock: seconds that never go back.
        """
        self._max_num_batched_tokens = max_num_batched_tokens
        self._eos_token_ids = eos_token_ids
        self._clock = clock
        self._now = clock()
        bound = WaitBound(max_wait_s, slots.num_slots, max_num_seqs)
        self._slots = slots
        self._clients = clients = Clients(bound)
        self._pages = pages = RequestPages(pool, page_size=page_size, enable_prefix_caching=enable_prefix_caching)
        self._residency = residency = Residency(slots, clients, pages, SlotPace(bound), is_in_host)
        self._running = running = Running(clients, pages, residency, max_num_seqs=max_num_seqs)
        self._claims = Claims(slots, clients, residency, turn_s=bound.turn_s)
        self._preemption = Preemption(slots, clients, pages, residency, running, bound)
        self._requests: dict[str, Request] = {}
        self._bound = bound
        self.slot_turns = SlotTurns(bound.num_adapter_places, bound.turn_s, bound.turn_s)  # of late
        self._look_again_s = bound.turn_s / 16
        self._last_look = _NEVER  # what had changed before the last look that left nobody who could be let in
        self._last_look_at = self._now
        self._give_up_s = max_wait_s - bound.turn_s / 4
        self._overdue_at = self._now  # when to look again for some
        self._num_put_off = 0  # tokens of running prompts that are left to later steps
        self._redone = 0.0  # of the last step's tokens, the part that had been computed before

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return self._clients.num_waiting

    @property
    def num_uncomputed_tokens(self) -> int:
        """Of prompts, and of what preempted requests had computed, what is left to steps after the planned one."""
        return self._clients.num_waiting_tokens + self._num_put_off

    @property
    def num_served_clients(self) -> int:
        """Clients (a tenant's requests for one adapter) with running requests."""
        return self._clients.num_served_clients

    @property
    def num_served_turns(self) -> int:
        """What `Entrance` needs to know of adapters whose clients are served."""
        return self._clients.num_served_turns

    @property
    def num_base_seats(self) -> int:
        """Seats that are kept for the base model from adapters' turns."""
        return self._clients.base_seats.part

    @property
    def num_preemptions(self) -> int:
        return self._running.num_preemptions

    @property
    def num_prefix_query_tokens(self) -> int:
        """Tokens that were known when requests started, for the first time or again."""
        return self._running.num_prefix_query_tokens

    @property
    def num_prefix_hit_tokens(self) -> int:
        """Of these, those that needed no computing."""
        return self._running.num_prefix_hit_tokens

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def holds(self, request: Request) -> bool:
        """Whether it has not ended; another one may have its id."""
        return self._requests.get(request.request_id) is request

    def add(self, request: Request) -> None:
        assert request.request_id not in self._requests
        assert self._pages.can_ever_hold(request.num_prompt_tokens + request.sampling.max_tokens)
        self._requests[request.request_id] = request
        self._clients.add(request, self._clock())

    def remove(self, request_id: str, *, is_spoiled: bool = False) -> bool:
        """Forget a request wherever it is, and free everything it holds. False: it is not here (any more).

        is_spoiled: its pages hold what nobody should find.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        self._running.remove(request, is_spoiled=is_spoiled)
        return True

    def need_of(self, digest: str) -> int:
        """How much an adapter is needed in host memory: 2 if a request for it has begun, 1 if it is in a slot or has
        come for one, else 0. For any thread.
        """
        if self._running.have_begun(digest):
            return 2
        return int(self._residency.has_come(digest) or self._slots.slot_of(digest) is not None)

    def come(self, digest: str) -> None:
        """An adapter that a plan's prefetches named is in host memory."""
        self._residency.come(digest, self._clock())

    def waiting_for(self, digest: str) -> list[str]:
        """Ids of the requests that wait and name this adapter."""
        return [request.request_id for request in self._clients.waiting_for(digest)]

    @property
    def is_overdue(self) -> bool:
        """Whether `overdue` may name some now."""
        max_wait_s, now = self._bound.max_wait_s, self._clock()
        return max_wait_s > 0 and now >= max(self._overdue_at, self._clients.seat_line.first_since + self._give_up_s)

    def overdue(self) -> list[str]:
        """Ids of the requests that could not be served in time: their clients have got nothing for `max_wait_s`, but
        for the last moment.

        One that has begun is never among them: it goes on.
        """
        if not self.is_overdue:
            return []
        now = self._clock()
        self._overdue_at = now + self._look_again_s
        return [request.request_id for request in self._clients.overdue(now - self._give_up_s)]

    def schedule(self) -> StepPlan:
        """Choose the next step: those that run go on, then waiting ones are let in."""
        self._now = self._clock()
        num_places = self._preemption.book(self._now, self._redone)
        self.slot_turns = self._residency.update_clients(self._now, num_places)
        reserved = self._preemption.give_turns(self._now, self.slot_turns.hold_s)
        scheduled: dict[Request, int] = {}
        budget, preempted = self._go_on(scheduled)
        prefetches: tuple[str, ...] = ()
        if reserved.keep or not scheduled or self._has_news():
            if not preempted and not reserved.lacks_pages:
                self._let_in(scheduled, budget, reserved)
            due = self._clients.slot_line.due(self._now)
            prefetches = self._residency.announce(due, self._now, self.slot_turns.turn_s)
        num_redone = sum(num for request, num in scheduled.items() if num > 1 and request.has_given_way)
        self._redone = num_redone / sum(scheduled.values()) if num_redone else 0.0
        slots_of = self._residency.slots_of
        entries = [Scheduled(request, num, slots_of(request.digests)) for request, num in scheduled.items()]
        return StepPlan(in_row_order(entries), self._residency.take_started(), prefetches)

    def advance(self, entry: Scheduled) -> None:
        """Book one scheduled part as computed. If it samples, its token is pending until `settle`."""
        request, samples = entry.request, entry.samples
        request.num_computed_tokens += entry.num_tokens
        self._name_known(request)
        if samples:
            request.token_ids.append(0)
            request.num_pending_tokens += 1
            self._clients.charge_output(request, self._now)

    def settle(self, request: Request, token_id: int) -> FinishReason | None:
        """Put the token in the place of the first that is pending; the reason if that ended the request."""
        assert request.num_pending_tokens and request.request_id in self._requests
        request.token_ids[request.num_known_tokens] = token_id
        request.num_pending_tokens -= 1
        self._name_known(request)
        sampling = request.sampling
        if token_id in sampling.stop_token_ids or (token_id in self._eos_token_ids and not sampling.ignore_eos):
            finish = FinishReason.STOP
        elif request.num_known_tokens - request.num_prompt_tokens >= sampling.max_tokens:
            finish = FinishReason.LENGTH
        else:
            return None
        self.remove(request.request_id)
        return finish

    def commit(self, entry: Scheduled, token_id: int | None) -> FinishReason | None:
        """`advance` and, with the token that it sampled, `settle`."""
        self.advance(entry)
        return None if token_id is None else self.settle(entry.request, token_id)

    def _name_known(self, request: Request) -> None:
        self._pages.name(request, min(request.num_computed_tokens, request.num_known_tokens))

    def _go_on(self, scheduled: dict[Request, int]) -> tuple[int, bool]:
        """Schedule running requests, single tokens before prompts; the budget that is left, and whether pages ran out.

        When they do, the request that ranks last gives way, of those that have got a token since they began.
        """
        grow = self._pages.grow
        budget = self._max_num_batched_tokens
        preempted = False
        prompts = []
        self._num_put_off = 0
        for request in list(self._running):
            if not request.pages or request.is_ending:
                continue  # preempted in this very loop, or only its last token is still to be known
            if request.num_uncomputed_tokens > 1:
                prompts.append(request)
                continue
            while not grow(request, request.num_tokens):
                preempted = True
                victim = self._preemption.free_pages()
                budget += scheduled.pop(victim, 0)
                if victim is request:
                    break
            else:
                if budget:
                    scheduled[request] = 1
                    budget -= 1
        prompts.sort(key=lambda request: not request.is_urgent)
        for request in prompts:
            if budget:
                budget -= self._schedule_prompt(request, budget, scheduled)
            else:
                self._num_put_off += request.num_uncomputed_tokens
        return budget, preempted

    def _has_news(self) -> bool:
        """Whether another look at those that wait might let one in, or start a load.

        In most steps it would not, and with thousands of adapters it costs more than all else that is decided. Only
        counters and the time go on by themselves; what they bring about (claims.py) is found a little later.
        """
        return self._changes() != self._last_look or self._now >= self._last_look_at + self._look_again_s

    def _changes(self) -> tuple[int, int, int]:
        return self._clients.num_changes, self._slots.num_changes, self._residency.num_come

    def _let_in(self, scheduled: dict[Request, int], budget: int, reserved: Reserved) -> None:
        """Start waiting requests in the order of service until budget, seats or pages run out.

        One whose adapter is in host memory but in no slot starts a load if a slot can be had; if none can, those that
        rank behind it pass. While someone's turn lacks a seat, only the base model's requests start, in the seats that
        are kept for them.
        """
        clients = self._clients
        hot = clients.hot()
        # What gave way for a turn goes on as if it had never stopped, so its adapter takes it whoever else waits.
        claimable = {adapter: digests for adapter, digests in hot.items() if adapter not in self._running.given_way}
        claimed = reserved.claimed | self._claims.find(claimable, reserved.claimed, self._now)
        unclaimed = {adapter: digests for adapter, digests in hot.items() if claimed.isdisjoint(digests)}
        ready = [adapter for adapter, digests in unclaimed.items() if self._residency.are_ready(digests)]
        if reserved.lacks_seats:
            ready = []
        keep = reserved.keep.union(*unclaimed.values())
        has_slot = not (reserved.is_gathering or reserved.lacks_seats)
        while True:
            warm = [client for adapter in (None, *ready) if (client := clients.first(adapter)) is not None]
            best = min(warm, key=clients.rank, default=None)
            while has_slot and (cold := next(iter(self._residency.next_at_hand()), None)) is not None:
                if best is not None and clients.rank(best) < clients.rank(cold):
                    break
                has_slot = self._residency.start_load(cold, keep, self._now)
                if has_slot:
                    keep.update(cold.digests)
                elif any(map(self._slots.lacks_bytes, cold.digests)):
                    self._load_beside(keep)
            if best is not None and budget == 0:
                self._last_look = _NEVER
                return
            if best is None or not self._running.num_free_seats:
                break
            if reserved.lacks_seats and not clients.num_kept_seats:
                break
            request = best.waiting[0]
            if request.num_pending_tokens:  # preempted amid a step; the next one will find its token
                self._last_look = _NEVER
                return
            if not self._running.start(request, self._now):
                break
            budget -= self._schedule_prompt(request, budget, scheduled)
        self._last_look, self._last_look_at = self._changes(), self._now

    def _load_beside(self, keep: set[str]) -> None:
        """Load cold adapters for which there is room, when the first in order waits for memory beside its slot."""
        for client in self._residency.next_at_hand():
            if any(map(self._slots.lacks_bytes, client.digests)) or not self._residency.missing(client):
                continue
            if not self._residency.start_load(client, keep, self._now):
                return
            keep.update(client.digests)

    def _schedule_prompt(self, request: Request, budget: int, scheduled: dict[Request, int]) -> int:
        """Schedule as many of a request's tokens as the budget allows; returns how many.

        Its full pages get their names at once: a step writes all keys and values of a layer before it reads any, so
        whoever starts later in this step may have them.
        """
        num_tokens = scheduled[request] = min(request.num_uncomputed_tokens, budget)
        self._num_put_off += request.num_uncomputed_tokens - num_tokens
        self._pages.name(request, request.num_computed_tokens + num_tokens)
        return num_tokens

    def check_integrity(self) -> None:
        """Every request waits or runs, holds what it should, and nothing else is held. For tests."""
        waiting = self._clients.check_integrity(list(self._running))
        ids = [request.request_id for request in [*self._running, *waiting]]
        assert sorted(ids) == sorted(self._requests)
        self._running.check_integrity(waiting)
