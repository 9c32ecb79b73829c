"""Who runs in the next step, and for how many tokens. Pure: no clock, no threads, no tensors.

One quantity decides everything: {request: number of tokens this step}. A prompt, a piece of a prompt, a single decode
token and the recomputation after a preemption are the same thing with different numbers.

Order is order of arrival. One thing lets a younger request pass an older one that waits: the older one's adapter has
no slot yet and the younger one's has. That keeps batches full, and it is bounded: after `patience` steps the passed
adapter claims a slot, whose adapter then takes no new requests until its running ones are done (see `_admit`).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from lorafleet.workers.engine.adapter_slots import AdapterSlots
from lorafleet.workers.engine.block_pool import BlockPool
from lorafleet.workers.engine.request import FinishReason, Request


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
        patience: int = 32,
    ) -> None:
        self._pool = pool
        self._slots = slots
        self._page_size = page_size
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._eos_token_ids = eos_token_ids
        self._patience = patience
        self._num_steps = 0
        self._blocked_since: dict[str, int] = {}  # adapters that wait for a slot → the step when that began
        self._announced: set[str] = set()  # adapters that still wait for a slot and were in a plan's prefetches
        self._requests: dict[str, Request] = {}
        self._running: list[Request] = []  # oldest first
        self._waiting: list[Request] = []  # oldest first
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def add(self, request: Request) -> None:
        assert request.request_id not in self._requests
        assert self._pages_for(request.num_prompt_tokens + request.sampling.max_tokens) <= self._pool.num_pages
        self._requests[request.request_id] = request
        insort(self._waiting, request, key=_by_arrival)

    def remove(self, request_id: str) -> bool:
        """Forget a request wherever it is, and free everything it holds. False: it is not here (any more)."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        if request in self._running:
            self._release(request)
            self._running.remove(request)
        else:
            self._waiting.remove(request)
        return True

    def waiting_for(self, digest: str) -> list[str]:
        """Ids of the requests that wait and name this adapter."""
        return [request.request_id for request in self._waiting if request.adapter == digest]

    def schedule(self) -> StepPlan:
        """Choose the next step. Running requests come first, oldest first, then waiting ones."""
        self._num_steps += 1
        scheduled: list[Scheduled] = []
        budget = self._max_num_batched_tokens
        preempted = False
        for request in list(self._running):
            if budget == 0:
                break
            if not request.pages:
                continue  # preempted for an older one in this very loop
            num_tokens = min(request.num_uncomputed_tokens, budget)
            while not self._grow(request, request.num_computed_tokens + num_tokens):
                # The youngest gives way. It recomputes later what it loses now; the oldest always gets on, so that
                # the whole always does.
                preempted = True
                victim = self._running[-1]
                self._preempt(victim)
                if victim is request:
                    break
            else:
                scheduled.append(self._entry(request, num_tokens))
                budget -= num_tokens
        loads: list[SlotLoad] = []
        if not preempted:
            for request in self._admit(loads):
                if budget == 0 or len(self._running) >= self._max_num_seqs:
                    break
                # All pages of what is known at once, so that no prompt is preempted half way.
                if not self._grow(request, request.num_tokens):
                    break
                self._waiting.remove(request)
                insort(self._running, request, key=_by_arrival)
                if request.adapter is not None:
                    self._slots.pin(request.adapter)
                num_tokens = min(request.num_uncomputed_tokens, budget)
                scheduled.append(self._entry(request, num_tokens))
                budget -= num_tokens
        scheduled.sort(key=lambda entry: -1 if entry.slot is None else entry.slot)
        return StepPlan(tuple(scheduled), tuple(loads), self._prefetches())

    def commit(self, entry: Scheduled, token_id: int | None) -> FinishReason | None:
        """Book one scheduled part as computed, with the token sampled at its end; the reason if that ended it."""
        request = entry.request
        request.num_computed_tokens += entry.num_tokens
        if token_id is None:
            return None
        request.token_ids.append(token_id)
        sampling = request.sampling
        if token_id in sampling.stop_token_ids or (token_id in self._eos_token_ids and not sampling.ignore_eos):
            finish = FinishReason.STOP
        elif request.num_output_tokens >= sampling.max_tokens:
            finish = FinishReason.LENGTH
        else:
            return None
        self.remove(request.request_id)
        return finish

    def _admit(self, loads: list[SlotLoad]) -> Iterator[Request]:
        """Waiting requests that may start now, oldest first; the caller stops when budget, seats or pages run out.

        A request whose adapter is in no slot starts a load (into `loads`) if a slot can be had. If none can, and it has
        been passed for long enough, its adapter claims one: of the adapters in use, that which is bound to be done
        first (by its requests' token limits). A claimed adapter admits nobody younger than the claim, so every wait is
        bounded by the patience and the tokens that running requests may still produce, however many new requests come
        for adapters that sit in slots.
        """
        blocked_since: dict[str, int] = {}
        claimed: set[str] = set()  # ready adapters whose slot is promised
        for request in list(self._waiting):
            digest = request.adapter
            if digest is None:
                yield request
                continue
            if self._slots.slot_of(digest) is not None:
                if digest not in claimed:
                    yield request
                continue
            if digest in blocked_since or self._slots.is_loading(digest):
                continue
            slot = self._slots.start_load(digest)
            if slot is not None:
                self._blocked_since.pop(digest, None)
                loads.append(SlotLoad(digest, slot))
                continue
            blocked_since[digest] = self._blocked_since.setdefault(digest, self._num_steps)
            if self._num_steps - blocked_since[digest] >= self._patience:
                claimed.update(self._slots.in_the_way(digest, self._tokens_to_go, claimed))
        self._blocked_since = blocked_since  # forgets adapters that nobody waits for any more

    def _prefetches(self) -> tuple[str, ...]:
        """The adapters that are next in line for a slot, oldest first, at most one a slot; each is named once.

        Looks only at the requests that could join the next batch, so that a long queue costs nothing.
        """
        next_up = dict.fromkeys(  # a set in order
            request.adapter
            for request in self._waiting[: self._max_num_seqs]
            if request.adapter is not None
            and self._slots.slot_of(request.adapter) is None
            and not self._slots.is_loading(request.adapter)
        )
        fresh = tuple(digest for digest in islice(next_up, self._slots.num_slots) if digest not in self._announced)
        self._announced = (self._announced & next_up.keys()).union(fresh)
        return fresh

    def _tokens_to_go(self, digest: str) -> int:
        """The most steps until all running requests of an adapter are done."""
        return max(request.max_remaining_tokens for request in self._running if request.adapter == digest)

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

    def _preempt(self, request: Request) -> None:
        self._running.remove(request)
        self._release(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        insort(self._waiting, request, key=_by_arrival)

    def _release(self, request: Request) -> None:
        self._pool.free(request.pages)
        if request.adapter is not None:
            self._slots.unpin(request.adapter)

    def check_integrity(self) -> None:
        """Every request is in one list, holds its pages and its pin, and nothing else is held. For tests."""
        for requests in (self._running, self._waiting):
            assert requests == sorted(requests, key=_by_arrival)
        ids = [request.request_id for request in self._running + self._waiting]
        assert sorted(ids) == sorted(self._requests)
        assert len(self._running) <= self._max_num_seqs
        self._pool.check_integrity(request.pages for request in self._requests.values())
        self._slots.check_integrity()
        pins: dict[str, int] = {}
        for request in self._running:
            assert request.num_computed_tokens <= len(request.pages) * self._page_size
            if request.adapter is not None:
                pins[request.adapter] = pins.get(request.adapter, 0) + 1
        assert pins == self._slots._pins
        assert all(not request.pages and not request.num_computed_tokens for request in self._waiting)


def _by_arrival(request: Request) -> int:
    return request.arrival
