"""Who runs in the next step, and for how many tokens. Pure: its clock is injected; no threads, no tensors.

One quantity decides everything: {request: number of tokens this step}. A prompt, a piece of a prompt, a single decode
token and the recomputation after a preemption are the same thing with different numbers.

Requests are let in in the order of service (clients.py): priority, then the tenant and its adapter that have had
least, then arrival. One thing lets a request pass one that ranks before it: that one's adapter has no slot yet and its
own has. That keeps batches full, and it is bounded twice. An adapter that has been passed for a turn claims a slot,
whose adapter then takes nobody new until its running requests are done (`_claims`). And where `max_wait_s` is at risk,
running requests give way (`_give_turns`).

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
from lorafleet.workers.engine.clients import Client, Clients
from lorafleet.workers.engine.prefix import extend_names
from lorafleet.workers.engine.request import FinishReason, Request
from lorafleet.workers.engine.turns import WaitBound


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One request's part of a step."""

    request: Request
    num_tokens: int  # from request.num_computed_tokens on
    slot: int | None  # the adapter's; None is the base model

    @property
    def samples(self) -> bool:
        """Whether this step reaches the end of what is known, so that a next token is to be sampled."""
        return self.request.num_computed_tokens + self.num_tokens == self.request.num_tokens


@dataclass(frozen=True, slots=True)
class SlotLoad:
    """An adapter to be copied into a slot; then `finish_load` or `fail_load` of the slots is due."""

    digest: str
    slot: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the next step computes, grouped by slot (base model first), so that an adapter's rows are one segment."""

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
        if request.adapter is not None and (runs or request.num_preemptions):
            self._begun[request.adapter] -= 1
            if not self._begun[request.adapter]:
                del self._begun[request.adapter]
        return True

    def is_in_use(self, digest: str) -> bool:
        """Whether an adapter is in a slot, or a request for it has begun and waits to go on. For any thread."""
        return digest in self._begun or self._slots.slot_of(digest) is not None

    def uses(self, digest: str) -> bool:
        """Whether any request, waiting or running, names this adapter."""
        return any(request.adapter == digest for request in self._requests.values())

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
        entries.sort(key=lambda entry: -1 if entry.slot is None else entry.slot)
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
        wanted = [digest for digest in self._slots.resident() if clients.is_wanted(digest)]
        claimed = turns.claimed | self._claims([digest for digest in wanted if digest not in turns.claimed])
        unclaimed = [digest for digest in wanted if digest not in claimed]
        keep = turns.keep.union(unclaimed)
        max_running = self._max_num_seqs - turns.num_seats
        has_slot = True
        while True:
            warm = [client for adapter in (None, *unclaimed) if (client := clients.first(adapter)) is not None]
            best = min(warm, key=clients.rank, default=None)
            while has_slot and (cold := clients.first_cold()) is not None:
                if best is not None and clients.rank(best) < clients.rank(cold):
                    break
                has_slot = self._start_load(cold, keep, loads)
                if not has_slot:
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
        for digest in self._clients.next_cold(self._slots.num_slots):
            client = self._clients.first(digest)
            if client is not None and not self._slots.lacks_bytes(digest) and not self._start_load(client, keep, loads):
                return

    def _claims(self, wanted: list[str]) -> set[str]:
        """Adapters that take nobody new, so that their slots come free: one for each cold one that they would pass.

        It must have waited for a turn and they have held their slots for one, and rank behind it: those that rank last
        are claimed first. One that waits for memory beside its slot claims all that have some.
        """
        before = self._now - self._turn_s
        ranks = {
            digest: self._clients.rank(client)
            for digest in wanted
            if self._held_since.get(digest, before) <= before and (client := self._clients.first(digest)) is not None
        }
        claimed: set[str] = set()
        for digest in self._clients.next_cold(self._slots.num_slots) if ranks else ():
            client = self._clients.first(digest)
            if not ranks or client is None or self._clients.slot_line.since(digest) > before:
                continue
            own_rank = self._clients.rank(client)
            behind = [other for other in self._slots.blockers(digest) if other in ranks and ranks[other] > own_rank]
            if not self._slots.lacks_bytes(digest):
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
            if client.adapter is None or self._slots.slot_of(client.adapter) is not None:
                due[client] = None
        due |= dict.fromkeys(client for _, *others in served for client in others)
        turns = _Turns(adapters, {client.adapter for client in due if client.adapter is not None})
        for client in due:
            digest = client.adapter
            if digest is None or self._slots.slot_of(digest) is not None:
                turns.is_blocked |= not self._start_by_turn(client)
                continue
            turns.num_seats += 1
            if self._slots.is_loading(digest):
                continue
            while not self._start_load(client, turns.keep, loads):
                others = [other for other in self._slots.obstacles(digest) if other not in turns.keep]
                if not self._preempt_one_of(others):
                    unclaimed = [other for other in others if other not in turns.claimed]
                    turns.claimed.update(sorted(unclaimed, key=self._held_since.__getitem__)[:1])
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

    def _preempt_one_of(self, adapters: list[str]) -> bool:
        """Take the slot from the adapter whose requests rank last, of those that have held theirs for a turn.

        An adapter with a request that has got no token yet is left alone. False: there is none.
        """
        before = self._now - self._turn_s
        held = {digest for digest in adapters if self._held_since[digest] <= before}
        running: dict[str, list[Request]] = {}
        for request in self._running:
            if request.adapter in held:
                running.setdefault(request.adapter, []).append(request)
        ranks = {
            digest: min(map(self._clients.rank_of, requests))
            for digest, requests in running.items()
            if all(request.has_progressed for request in requests)
        }
        if not ranks:
            return False
        for request in running[max(ranks, key=ranks.__getitem__)]:
            self._preempt(request)
        return True

    def _prefetches(self, adapters: list[str]) -> tuple[str, ...]:
        """The adapters that are next in line for a slot, at most one a slot; each is named once."""
        next_up = dict.fromkeys(digest for digest in adapters if self._is_cold(digest))  # a set in order
        names = list(next_up)[: self._slots.num_slots]
        fresh = tuple(digest for digest in names if digest not in self._announced)
        self._announced = self._announced.intersection(names).union(fresh)
        return fresh

    def _is_cold(self, digest: str) -> bool:
        return self._slots.slot_of(digest) is None and not self._slots.is_loading(digest)

    def _start_load(self, client: Client, keep: set[str], loads: list[SlotLoad]) -> bool:
        """Bring a client's adapter into a slot, if one can be had. From here on it counts as served."""
        digest = client.adapter
        assert digest is not None
        slot = self._slots.start_load(digest, keep)
        if slot is None:
            return False
        loads.append(SlotLoad(digest, slot))
        self._held_since = {held: since for held, since in self._held_since.items() if not self._is_cold(held)}
        self._held_since[digest] = self._now
        request = client.waiting[0]
        self._clients.charge_prompt(request, self._page_size * len(self._find(request)))
        self._clients.set_hot(self._slots.occupants())
        return True

    def _entry(self, request: Request, num_tokens: int) -> Scheduled:
        slot = None if request.adapter is None else self._slots.slot_of(request.adapter)
        return Scheduled(request, num_tokens, slot)

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
            extend_names(request.prefix_names, request.prefix_root, request.token_ids, self._page_size, num_pages)
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
        names = request.prefix_names
        extend_names(names, request.prefix_root, request.token_ids, self._page_size, num_pages)
        for number in range(request.num_named_pages, num_pages):
            self._pool.name(request.pages[number], names[number])
        request.num_named_pages = num_pages

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
        if request.adapter is not None:
            if not request.num_preemptions:
                self._begun[request.adapter] += 1
            self._slots.pin(request.adapter)
            self._held_since.setdefault(request.adapter, self._now)

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
        if request.adapter is not None:
            self._slots.unpin(request.adapter)
            if not self._slots.is_pinned(request.adapter):
                del self._held_since[request.adapter]

    def check_integrity(self) -> None:
        """Every request is in one list, holds its pages and its pin, and nothing else is held. For tests."""
        waiting = self._clients.check_integrity(self._running)
        ids = [request.request_id for request in self._running + waiting]
        assert sorted(ids) == sorted(self._requests)
        assert len(self._running) <= self._max_num_seqs
        self._pool.check_integrity(request.pages for request in self._requests.values())
        self._slots.check_integrity()
        pins: dict[str, int] = {}
        for request in self._running:
            assert request.num_computed_tokens <= len(request.pages) * self._page_size
            assert request.is_charged
            self._check_names(request)
            if request.adapter is not None:
                pins[request.adapter] = pins.get(request.adapter, 0) + 1
        assert pins == self._slots._pins
        assert pins.keys() <= self._held_since.keys()
        begun = [request.adapter for request in waiting if request.num_preemptions]
        begun += [request.adapter for request in self._running]
        assert self._begun == Counter(adapter for adapter in begun if adapter is not None)
        assert all(not request.pages and not request.num_computed_tokens for request in waiting)

    def _check_names(self, request: Request) -> None:
        """Its pages are found, if at all, by their own names. For tests."""
        for number, page in enumerate(request.pages):
            name = self._pool.name_of(page)
            assert name is None or (number < request.num_named_pages and name == request.prefix_names[number])
