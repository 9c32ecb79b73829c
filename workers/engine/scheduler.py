"""Who runs in the next step, and for how many tokens. Pure: its clock is injected; no threads, no tensors.

One quantity decides everything: {request: number of tokens this step}. A prompt, a piece of a prompt, a single decode
token and the recomputation after a preemption are the same thing with different numbers.

Requests are let in in the order of service (clients.py): priority, then the tenant and its adapter that have had
least, then arrival. One thing lets a request pass one that ranks before it: that one's adapter has no slot yet and its
own has. That keeps batches full, and it is bounded twice. An adapter that has been passed for a turn claims a slot,
whose adapter then takes nobody new until its running requests are done (`_claims`). And where `max_wait_s` is at risk,
running requests give way (`_give_turns`).

A composition of adapters takes the slots of all of them or of none: loads start for all that are cold at once, or not
at all, and what it finds in slots is kept for it only from then on. So none holds a slot while it waits for another
one; it waits for loads, which end by themselves, or for seats and pages, whose holders wait for no slot. Nobody waits
in a circle. Slots come free one by one, though: while a composition is the first that waits for slots, nobody that
ranks behind it gets one, and those that it claims take nobody new, idle ones first.

What the first pages of a request hold may have been computed for another one, or for itself before it was preempted
(prefix.py); then it starts behind that. At least one token is left to compute.

A request that has begun to run is never preempted before it has got a token. So every preemption is paid for with a
token that was not there before, there are fewer preemptions than tokens, and requests cannot preempt each other for
ever, whoever gives way to whom. Nor can a step be left with nobody to run for want of pages: only a request that has
got a token needs more of them, so it may give way itself, and the last one finds all that it needs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from lorafleet.workers.engine.adapter_slots import AdapterSlots
from lorafleet.workers.engine.block_pool import BlockPool
from lorafleet.workers.engine.clients import Client, Clients, Rank
from lorafleet.workers.engine.prefix import extend_names
from lorafleet.workers.engine.request import FinishReason, Request
from lorafleet.workers.engine.turns import WaitBound


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One request's part of a step."""

    request: Request
    num_tokens: int  # from request.num_computed_tokens on
    slots: tuple[int, ...]  # of request.digests; none: the base model

    @property
    def samples(self) -> bool:
        """Whether this step reaches the end of what is known, so that a next token is to be sampled."""
        return self.request.num_computed_tokens + self.num_tokens == self.request.num_tokens

    @property
    def num_base_tokens(self) -> int:
        """Of its tokens the first ones, which come before the place where the adapter begins."""
        return min(self.num_tokens, max(0, self.request.adapter_start - self.request.num_computed_tokens))


@dataclass(frozen=True, slots=True)
class SlotLoad:
    """An adapter to be copied into a slot; then `finish_load` or `fail_load` of the slots is due."""

    digest: str
    slot: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the next step computes, grouped by slots (base model first), so that an adapter's rows are one segment.

    Where an activated adapter begins amid a request's rows, those before it part the others from the group. Such
    requests come first in their group: there is one segment for each of them, and none more for all others.
    """

    scheduled: tuple[Scheduled, ...]
    loads: tuple[SlotLoad, ...]
    prefetches: tuple[str, ...] = ()  # adapters to bring into the host cache, since slots are to come free for them

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.scheduled)


@dataclass(slots=True)
class _Turns:
    """What those that must have a turn still lack, and others therefore cannot have in this step."""

    adapters: list[str]  # that must have a slot, longest wait first
    keep: set[str]  # adapters of all that must have a turn: they are not evicted
    claimed: set[str] = field(default_factory=set)  # adapters that take nobody new
    num_seats: int = 0  # kept free for requests whose adapters are being loaded
    is_gathering: bool = False  # slots come free for a composition: nobody else may take them
    is_blocked: bool = False  # someone waits for a seat or pages: nobody else may take them


class Scheduler:
    """Owns every request from `add` to its end, their pages and their pins."""

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """max_wait_s: how long a client may get no token; 0 is no bound. clock: seconds that never go back."""
        self._pool = pool
        self._slots = slots
        self._page_size = page_size
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._eos_token_ids = eos_token_ids
        self._enable_prefix_caching = enable_prefix_caching
        self._clock = clock
        self._now = clock()
        bound = WaitBound(max_wait_s, slots.num_slots, max_num_seqs)
        self._turn_s = bound.turn_s
        self._clients = Clients(bound)
        self._held_since: dict[str, float] = {}  # adapters in or on the way into slots → when they got them
        self._announced: set[str] = set()  # adapters that still wait for a slot and were in a plan's prefetches
        self._requests: dict[str, Request] = {}
        self._begun: Counter[str] = Counter()  # adapters → requests that have begun to run and have not ended
        self._running: list[Request] = []  # by start; prompts are computed in this order
        self.num_preemptions = 0
        self.num_prefix_query_tokens = 0  # known when requests started
        self.num_prefix_hit_tokens = 0  # of these, those that needed no computing

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return self._clients.num_waiting

    @property
    def num_served_clients(self) -> int:
        """Clients (a tenant's requests for one adapter) with running requests."""
        return self._clients.num_served_clients

    @property
    def num_served_turns(self) -> int:
        """What `Entrance` needs to know of adapters whose clients are served."""
        return self._clients.num_served_turns

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def add(self, request: Request) -> None:
        assert request.request_id not in self._requests
        assert self._pages_for(request.num_prompt_tokens + request.sampling.max_tokens) <= self._pool.num_pages
        self._requests[request.request_id] = request
        self._clients.add(request, self._clock())

    def remove(self, request_id: str, *, is_spoiled: bool = False) -> bool:
        """Forget a request wherever it is, and free everything it holds. False: it is not here (any more).

        is_spoiled: its pages hold what nobody should find.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        runs = request in self._running
        if runs:
            if is_spoiled:
                self._pool.spoil(request.pages)
            self._running.remove(request)
            self._release(request)
        self._clients.drop(request, runs=runs)
        if runs or request.num_preemptions:
            for digest in request.digests:
                self._begun[digest] -= 1
                if not self._begun[digest]:
                    del self._begun[digest]
        return True

    def is_in_use(self, digest: str) -> bool:
        """Whether an adapter is in a slot, or a request for it has begun and waits to go on. For any thread."""
        return digest in self._begun or self._slots.slot_of(digest) is not None

    def uses(self, digest: str) -> bool:
        """Whether any request, waiting or running, names this adapter."""
        return any(digest in request.digests for request in self._requests.values())

    def waiting_for(self, digest: str) -> list[str]:
        """Ids of the requests that wait and name this adapter."""
        return [request.request_id for request in self._clients.waiting_for(digest)]

    def schedule(self) -> StepPlan:
        """Choose the next step: those that run go on, then waiting ones are let in."""
        self._now = self._clock()
        self._clients.set_hot(self._slots.occupants())
        self._clients.set_pinned(self._slots.num_staying)
        loads: list[SlotLoad] = []
        turns = self._give_turns(loads)
        scheduled: dict[Request, int] = {}
        budget, preempted = self._go_on(scheduled)
        if not preempted and not turns.is_blocked:
            self._let_in(scheduled, budget, turns, loads)
        cold = self._clients.next_cold(self._slots.num_slots)
        entries = [self._entry(request, num_tokens) for request, num_tokens in scheduled.items()]
        entries.sort(key=_row_order)
        return StepPlan(tuple(entries), tuple(loads), self._prefetches([*turns.adapters, *cold]))

    def commit(self, entry: Scheduled, token_id: int | None) -> FinishReason | None:
        """Book one scheduled part as computed, with the token sampled at its end; the reason if that ended it."""
        request = entry.request
        request.num_computed_tokens += entry.num_tokens
        self._name_pages(request, request.num_computed_tokens)
        if token_id is None:
            return None
        request.token_ids.append(token_id)
        self._clients.charge_output(request, self._now)
        sampling = request.sampling
        if token_id in sampling.stop_token_ids or (token_id in self._eos_token_ids and not sampling.ignore_eos):
            finish = FinishReason.STOP
        elif request.num_output_tokens >= sampling.max_tokens:
            finish = FinishReason.LENGTH
        else:
            return None
        self.remove(request.request_id)
        return finish

    def _go_on(self, scheduled: dict[Request, int]) -> tuple[int, bool]:
        """Schedule running requests, single tokens before prompts; the budget that is left, and whether pages ran out.

        When they do, the request that ranks last gives way, of those that have got a token since they began.
        """
        budget = self._max_num_batched_tokens
        preempted = False
        prompts = []
        for request in list(self._running):
            if not request.pages:
                continue  # preempted in this very loop
            if request.num_uncomputed_tokens > 1:
                prompts.append(request)
                continue
            while not self._grow(request, request.num_tokens):
                preempted = True
                victim = max((other for other in self._running if other.has_progressed), key=self._clients.rank_of)
                budget += scheduled.pop(victim, 0)
                self._preempt(victim)
                if victim is request:
                    break
            else:
                if budget:
                    scheduled[request] = 1
                    budget -= 1
        prompts.sort(key=lambda request: not request.is_urgent)
        for request in prompts:
            if budget == 0:
                break
            budget -= self._schedule_prompt(request, budget, scheduled)
        return budget, preempted

    def _let_in(self, scheduled: dict[Request, int], budget: int, turns: _Turns, loads: list[SlotLoad]) -> None:
        """Start waiting requests in the order of service until budget, seats or pages run out.

        One whose adapter is in no slot starts a load (into `loads`) if a slot can be had; if none can, those that rank
        behind it pass.
        """
        clients = self._clients
        hot = clients.hot()
        claimed = turns.claimed | self._claims(hot, turns.claimed)
        unclaimed = {adapter: digests for adapter, digests in hot.items() if claimed.isdisjoint(digests)}
        ready = [adapter for adapter, digests in unclaimed.items() if self._are_ready(digests)]
        keep = turns.keep.union(*unclaimed.values())
        max_running = self._max_num_seqs - turns.num_seats
        has_slot = not turns.is_gathering
        while True:
            warm = [client for adapter in (None, *ready) if (client := clients.first(adapter)) is not None]
            best = min(warm, key=clients.rank, default=None)
            while has_slot and (cold := clients.first_cold()) is not None:
                if best is not None and clients.rank(best) < clients.rank(cold):
                    break
                has_slot = self._start_load(cold, keep, loads)
                if has_slot:
                    keep.update(cold.digests)
                elif any(map(self._slots.lacks_bytes, cold.digests)):
                    self._load_beside(keep, loads)
            if best is None or budget == 0 or len(self._running) >= max_running:
                return
            request = best.waiting[0]
            if not self._place(request):
                return
            self._start(request)
            budget -= self._schedule_prompt(request, budget, scheduled)

    def _load_beside(self, keep: set[str], loads: list[SlotLoad]) -> None:
        """Load cold adapters for which there is room, when the first in order waits for memory beside its slot."""
        for adapter in self._clients.next_cold(self._slots.num_slots):
            client = self._clients.first(adapter)
            if client is None or not self._missing(client) or any(map(self._slots.lacks_bytes, client.digests)):
                continue
            if not self._start_load(client, keep, loads):
                return
            keep.update(client.digests)

    def _claims(self, hot: dict[str, tuple[str, ...]], claimed_before: set[str]) -> set[str]:
        """Adapters that take nobody new, so that their slots come free: one for each cold one that they would pass.

        It must have waited for a turn and they have held their slots for one, and rank behind it: those that rank last
        are claimed first, for a composition idle ones before them. One that waits for memory beside its slot claims
        all that have some.
        """
        before = self._now - self._turn_s
        ranks: dict[str, Rank] = {}  # of the best that want an adapter
        for adapter, digests in hot.items():
            client = self._clients.first(adapter)
            for digest in digests if client is not None and claimed_before.isdisjoint(digests) else ():
                if self._slots.slot_of(digest) is not None and self._held_since.get(digest, before) <= before:
                    assert client is not None
                    rank = self._clients.rank(client)
                    ranks[digest] = min(rank, ranks.get(digest, rank))
        claimed: set[str] = set()
        for adapter in self._clients.next_cold(self._slots.num_slots) if ranks else ():
            client = self._clients.first(adapter)
            if not ranks or client is None or self._clients.slot_line.since(adapter) > before:
                continue
            own_rank = self._clients.rank(client)
            missing = self._missing(client)
            behind = [other for other in self._slots.blockers(missing[0]) if other in ranks and ranks[other] > own_rank]
            if len(client.digests) > 1:
                behind = [other for other in behind if other not in client.digests]
                behind.sort(key=lambda other: (not self._slots.is_pinned(other), ranks[other]))
                wanted = set(client.digests).union(*hot.values())
                behind = behind[-max(1, self._slots.num_lacking(len(missing), wanted)) :]
            elif not self._slots.lacks_bytes(missing[0]):
                behind = sorted(behind, key=ranks.__getitem__)[-1:]
            for other in behind:
                del ranks[other]
            claimed.update(behind)
        return claimed

    def _give_turns(self, loads: list[SlotLoad]) -> _Turns:
        """Give places to those that could not be served in time otherwise; running requests give way (turns.py)."""
        clients = self._clients
        adapters = clients.slot_line.due(self._now)
        served = [clients.served_by_turn(digest) for digest in adapters]
        due = dict.fromkeys(first for first, *_ in served)  # a set in order
        for client in clients.seat_line.due(self._now):
            if self._are_ready(client.digests):
                due[client] = None
        due |= dict.fromkeys(client for _, *others in served for client in others)
        turns = _Turns(adapters, {digest for client in due for digest in client.digests})
        for client in due:
            if self._are_ready(client.digests):
                turns.is_blocked |= not self._start_by_turn(client)
                continue
            turns.num_seats += 1
            missing = self._missing(client)
            if not missing or turns.is_gathering:
                continue
            while not self._start_load(client, turns.keep, loads):
                others = [other for other in self._slots.obstacles(missing[0]) if other not in turns.keep]
                num_lacking = max(1, self._slots.num_lacking(len(missing), turns.keep))
                if not self._preempt_some_of(others, num_lacking):
                    unclaimed = [other for other in others if other not in turns.claimed]
                    turns.claimed.update(sorted(unclaimed, key=self._held_since.__getitem__)[:num_lacking])
                    if len(missing) > 1:
                        turns.is_gathering = True
                        idle = [other for other in self._slots.blockers(missing[0]) if not self._slots.is_pinned(other)]
                        turns.claimed.update(other for other in idle if other not in turns.keep)
                    break
        return turns

    def _start_by_turn(self, client: Client) -> bool:
        """Start a client's next request before all others, in place of running ones if need be.

        Those give way that rank last, and have run for a turn and got a token. Nobody does if it would not suffice.
        """
        request = client.waiting[0]
        before = self._now - self._turn_s
        others = [other for other in self._running if other.has_progressed and other.started_at <= before]
        others.sort(key=self._clients.rank_of)
        found = self._find(request)
        num_pages = self._pool.num_free_without((other.pages for other in others), set(found))
        if num_pages < self._pages_for(request.num_tokens) - len(found):
            return False
        while len(self._running) >= self._max_num_seqs or not self._place(request):
            if not others:
                return False
            self._preempt(others.pop())
        self._start(request)
        request.is_urgent = True
        return True

    def _preempt_some_of(self, adapters: list[str], num_slots: int) -> bool:
        """Take the slots from the adapters whose requests rank last, of those that have held theirs for a turn.

        An adapter with a request that has got no token yet is left alone. False, and nothing is taken: there are fewer.
        """
        before = self._now - self._turn_s
        held = {digest for digest in adapters if self._held_since[digest] <= before}
        running: dict[str, list[Request]] = {}
        for request in self._running:
            for digest in request.digests:
                if digest in held:
                    running.setdefault(digest, []).append(request)
        ranks = {
            digest: min(map(self._clients.rank_of, requests))
            for digest, requests in running.items()
            if all(request.has_progressed for request in requests)
        }
        if len(ranks) < num_slots:
            return False
        for digest in sorted(ranks, key=ranks.__getitem__)[-num_slots:]:
            for request in running[digest]:
                if request.pages:  # a composition may be preempted for several
                    self._preempt(request)
        return True

    def _prefetches(self, adapters: list[str]) -> tuple[str, ...]:
        """The adapters that are next in line for a slot, at most one a slot; each is named once."""
        digests = [digest for adapter in adapters for digest in self._clients.digests_of(adapter)]
        next_up = dict.fromkeys(digest for digest in digests if self._is_cold(digest))  # a set in order
        names = list(next_up)[: self._slots.num_slots]
        fresh = tuple(digest for digest in names if digest not in self._announced)
        self._announced = self._announced.intersection(names).union(fresh)
        return fresh

    def _is_cold(self, digest: str) -> bool:
        return self._slots.slot_of(digest) is None and not self._slots.is_loading(digest)

    def _are_ready(self, digests: tuple[str, ...]) -> bool:
        return all(self._slots.slot_of(digest) is not None for digest in digests)

    def _missing(self, client: Client) -> list[str]:
        """Of the adapters that a client needs, those that are in no slot and not on the way there."""
        return [digest for digest in client.digests if self._is_cold(digest)]

    def _start_load(self, client: Client, keep: set[str], loads: list[SlotLoad]) -> bool:
        """Bring all that a client's adapter lacks into slots, if they can be had. From here on it counts as served."""
        missing = self._missing(client)
        slots = self._slots.start_loads(missing, keep.union(client.digests))
        if slots is None:
            return False
        loads += [SlotLoad(digest, slot) for digest, slot in zip(missing, slots, strict=True)]
        self._held_since = {held: since for held, since in self._held_since.items() if not self._is_cold(held)}
        self._held_since.update(dict.fromkeys(missing, self._now))
        request = client.waiting[0]
        self._clients.charge_prompt(request, self._page_size * len(self._find(request)))
        self._clients.set_hot(self._slots.occupants())
        return True

    def _entry(self, request: Request, num_tokens: int) -> Scheduled:
        slots = tuple(slot for digest in request.digests if (slot := self._slots.slot_of(digest)) is not None)
        assert len(slots) == len(request.digests)
        return Scheduled(request, num_tokens, slots)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Give the request pages for its first `num_tokens` tokens, or nothing."""
        pages = self._pool.allocate(max(0, self._pages_for(num_tokens) - len(request.pages)))
        if pages is None:
            return False
        request.pages.extend(pages)
        return True

    def _find(self, request: Request) -> list[int]:
        """Pages that hold a waiting request's tokens already, all but the last token at most: that one is computed."""
        if not self._enable_prefix_caching:
            return []
        num_pages = (request.num_tokens - 1) // self._page_size
        if num_pages > len(request.prefix_names):
            self._extend_names(request, num_pages)
        return self._pool.find(request.prefix_names[:num_pages])

    def _place(self, request: Request) -> bool:
        """Give a waiting request pages for all that is known, so that no prompt is preempted half way, or nothing."""
        found = self._find(request)
        pages = self._pool.allocate(self._pages_for(request.num_tokens) - len(found), found)
        if pages is None:
            return False
        request.pages = pages
        request.num_named_pages = len(found)
        request.num_computed_tokens = len(found) * self._page_size
        return True

    def _schedule_prompt(self, request: Request, budget: int, scheduled: dict[Request, int]) -> int:
        """Schedule as many of a request's tokens as the budget allows; returns how many.

        Its full pages get their names at once: a step writes all keys and values of a layer before it reads any, so
        whoever starts later in this step may have them.
        """
        num_tokens = scheduled[request] = min(request.num_uncomputed_tokens, budget)
        self._name_pages(request, request.num_computed_tokens + num_tokens)
        return num_tokens

    def _name_pages(self, request: Request, num_tokens: int) -> None:
        """Name the pages that the first `num_tokens` tokens of a request fill."""
        num_pages = num_tokens // self._page_size
        if num_pages <= request.num_named_pages or not self._enable_prefix_caching:
            return
        self._extend_names(request, num_pages)
        for number in range(request.num_named_pages, num_pages):
            self._pool.name(request.pages[number], request.prefix_names[number])
        request.num_named_pages = num_pages

    def _extend_names(self, request: Request, num_pages: int) -> None:
        extend_names(
            request.prefix_names,
            request.prefix_root,
            request.token_ids,
            self._page_size,
            num_pages,
            parting=request.prefix_parting,
            start=request.adapter_start,
        )

    def _start(self, request: Request) -> None:
        """Let a waiting request that has its pages run."""
        self._clients.start(request)
        self._clients.charge_prompt(request, request.num_computed_tokens)
        self.num_prefix_query_tokens += request.num_tokens
        self.num_prefix_hit_tokens += request.num_computed_tokens
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed_tokens
        self._running.append(request)
        request.is_urgent = False
        request.started_at = self._now
        request.num_tokens_at_start = request.num_tokens
        for digest in request.digests:
            if not request.num_preemptions:
                self._begun[digest] += 1
            self._slots.pin(digest)
            self._held_since.setdefault(digest, self._now)

    def _preempt(self, request: Request) -> None:
        assert request.has_progressed
        self._running.remove(request)
        self._release(request)
        request.num_computed_tokens = request.num_named_pages = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._clients.put_back(request)

    def _release(self, request: Request) -> None:
        self._pool.free(request.pages)
        for digest in request.digests:
            self._slots.unpin(digest)
            if not self._slots.is_pinned(digest):
                del self._held_since[digest]

    def check_integrity(self) -> None:
        """Every request is in one list, holds its pages and its pin, and nothing else is held. For tests."""
        waiting = self._clients.check_integrity(self._running)
        ids = [request.request_id for request in self._running + waiting]
        assert sorted(ids) == sorted(self._requests)
        assert len(self._running) <= self._max_num_seqs
        self._pool.check_integrity(request.pages for request in self._requests.values())
        self._slots.check_integrity()
        pins: Counter[str] = Counter()
        for request in self._running:
            assert request.num_computed_tokens <= len(request.pages) * self._page_size
            assert request.is_charged
            self._check_names(request)
            pins.update(request.digests)
        assert pins == self._slots._pins
        assert pins.keys() <= self._held_since.keys()
        begun = [request for request in waiting if request.num_preemptions] + self._running
        assert self._begun == Counter(digest for request in begun for digest in request.digests)
        assert all(not request.pages and not request.num_computed_tokens for request in waiting)

    def _check_names(self, request: Request) -> None:
        """Its pages are found, if at all, by their own names. For tests."""
        for number, page in enumerate(request.pages):
            name = self._pool.name_of(page)
            assert name is None or (number < request.num_named_pages and name == request.prefix_names[number])


def _row_order(entry: Scheduled) -> tuple[tuple[int, ...], tuple[float, ...], bool]:
    num_base_tokens = entry.num_base_tokens
    if num_base_tokens == entry.num_tokens:
        return (), (), False
    return entry.slots, entry.request.weights, num_base_tokens == 0
