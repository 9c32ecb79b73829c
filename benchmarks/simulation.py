"""The real scheduler on a virtual clock: a model that says nothing, steps and loads that take given times.

What it decides is what it would decide in a server; what it costs is the scheduler's own time. Seconds below are the
virtual clock's.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count

from lorafleet.workers.engine.adapter_slots import AdapterSlots
from lorafleet.workers.engine.batch import StepPlan
from lorafleet.workers.engine.block_pool import BlockPool
from lorafleet.workers.engine.fairness import OUTPUT_TOKEN, PROMPT_TOKEN
from lorafleet.workers.engine.request import GenerateRequest, Request, SamplingOptions
from lorafleet.workers.engine.scheduler import Scheduler
from lorafleet.workers.engine.turns import Entrance, WaitBound
from lorafleet.workers.errors import QueueFullError

Key = tuple[str, str | None]  # (tenant, adapter or composition)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    at_s: float
    tenant: str
    adapter: str | None
    num_prompt: int
    num_output: int
    weight: float = 1.0  # the tenant's
    priority: int = 0
    repeats: bool = False  # sent again as soon as it has ended, so that its client never has nothing to do
    retries: bool = False  # sent again when it was refused, after the time that the refusal names
    others: tuple[str, ...] = ()  # more adapters, applied together with `adapter`


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is, and how long things take."""

    num_slots: int = 8
    num_seats: int = 64
    num_pages: int = 1 << 16
    page_size: int = 16
    max_num_batched_tokens: int = 512
    step_s: float = 0.02
    token_s: float = 0.0002  # more for each token in a step
    load_s: float = 0.2  # from host memory into a slot
    read_s: float = 0.0  # from the disk into host memory; 0: all adapters are there
    num_readers: int = 4
    num_host: int = 16  # adapters that host memory holds
    hung: frozenset[str] = frozenset()  # adapters whose reads never end


@dataclass(slots=True)
class Outcome:
    """What came of a trace. Waits are the longest that a client with requests got no token, by client."""

    num_accepted: int = 0
    num_refused: int = 0
    num_given_up: int = 0  # refused after they had waited for as long as the bound allows
    num_finished: int = 0
    num_tokens: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    seconds: float = 0.0
    schedule_s: list[float] = field(default_factory=list)  # real time of each call
    first_waits: dict[Key, float] = field(default_factory=dict)  # until the first token since it came, or came back
    waits: dict[Key, float] = field(default_factory=dict)  # between any two tokens
    service: dict[str, float] = field(default_factory=dict)  # by tenant, not weighted
    history: list[tuple[float, dict[str, float]]] = field(default_factory=list)  # (time, service by tenant)
    # At each new adapter: (how many turns were waited for, how many may be, refused).
    refusals: list[tuple[int, int, bool]] = field(default_factory=list)


class Simulation:
    """One server. Run it once."""

    def __init__(self, machine: Machine, max_wait_s: float, *, check: bool = False) -> None:
        """check: after each step, that nothing has leaked."""
        self.now = 0.0
        self.outcome = Outcome()
        self._machine = machine
        self._check = check
        self._slots = AdapterSlots(machine.num_slots)
        self.scheduler = Scheduler(
            BlockPool(machine.num_pages),
            self._slots,
            page_size=machine.page_size,
            max_num_seqs=machine.num_seats,
            max_num_batched_tokens=machine.max_num_batched_tokens,
            eos_token_ids=frozenset(),
            max_wait_s=max_wait_s,
            is_in_host=self._is_in_host,
            clock=lambda: self.now,
        )
        self._bound = WaitBound(max_wait_s, machine.num_slots, machine.num_seats)
        self._entrance = Entrance(self._bound)
        self._numbers = count()
        self._arrivals: list[tuple[float, int, Arrival]] = []
        self._loads: list[tuple[float, str]] = []
        self._reads: list[tuple[float, str]] = []
        self._readers = [0.0] * machine.num_readers  # when each is free again
        self._host: OrderedDict[str, None] = OrderedDict()  # least recently used first
        self._arrival_of: dict[str, Arrival] = {}
        self._num_open: dict[Key, int] = defaultdict(int)
        self._unserved_since: dict[Key, float] = {}
        self._had_token: set[Key] = set()

    def run(
        self,
        trace: Iterable[Arrival],
        until_s: float,
        each_step: Callable[[Simulation, StepPlan], None] | None = None,
    ) -> Outcome:
        """Play a trace; what is unfinished after `until_s` counts with what it has waited by then."""
        for arrival in trace:
            heapq.heappush(self._arrivals, (arrival.at_s, next(self._numbers), arrival))
        while self.now < until_s:
            self._take_in()
            began = time.perf_counter()
            plan = self.scheduler.schedule()
            self.outcome.schedule_s.append(time.perf_counter() - began)
            for digest in plan.prefetches:
                if self._is_in_host(digest):
                    self.scheduler.come(digest)
                else:
                    self._read(digest)
            for load in plan.loads:
                read_at = self.now if self._is_in_host(load.digest) else self._read(load.digest)
                heapq.heappush(self._loads, (read_at + self._machine.load_s, load.digest))
            if plan.scheduled:
                self._step(plan)
            elif not self._skip_to_next_event():
                break
            self._give_up()
            if each_step is not None:
                each_step(self, plan)
            if self._check:
                self.scheduler.check_integrity()
        for key, since in self._unserved_since.items():
            self._note_wait(key, self.now - since)
        self.outcome.num_preemptions = self.scheduler.num_preemptions
        self.outcome.seconds = self.now
        return self.outcome

    def _is_in_host(self, digest: str) -> bool:
        return not self._machine.read_s or digest in self._host

    def _read(self, digest: str) -> float:
        """Bring an adapter into host memory; when it will be there."""
        if digest in self._machine.hung:
            return math.inf
        done_at = max(self.now, heapq.heappop(self._readers)) + self._machine.read_s
        heapq.heappush(self._readers, done_at)
        heapq.heappush(self._reads, (done_at, digest))
        return done_at

    def _end_read(self, digest: str) -> None:
        self._host[digest] = None
        while len(self._host) > self._machine.num_host:
            spare = [other for other in self._host if other != digest]
            del self._host[min(spare, key=self.scheduler.need_of)]
        self.scheduler.come(digest)

    def _give_up(self) -> None:
        for request_id in self.scheduler.overdue():
            arrival = self._arrival_of.pop(request_id)
            request = self.scheduler._requests[request_id]
            self.scheduler.remove(request_id)
            self.outcome.num_given_up += 1
            key = (request.tenant, request.adapter)
            self._note_wait(key, self.now - self._unserved_since[key])
            self._leave(key, arrival)
            if arrival.repeats or arrival.retries:
                self._push_again(arrival, 1.0)

    def _take_in(self) -> None:
        while self._reads and self._reads[0][0] <= self.now:
            self._end_read(heapq.heappop(self._reads)[1])
        while self._loads and self._loads[0][0] <= self.now:
            self._slots.finish_load(heapq.heappop(self._loads)[1])
        while self._arrivals and self._arrivals[0][0] <= self.now:
            self._submit(heapq.heappop(self._arrivals)[2])

    def _submit(self, arrival: Arrival) -> None:
        number = next(self._numbers)
        generate = GenerateRequest(
            f"{number}",
            (number,) * arrival.num_prompt,  # no two prompts begin alike
            SamplingOptions(max_tokens=arrival.num_output),
            None if arrival.others else arrival.adapter,
            arrival.tenant,
            arrival.weight,
            priority=arrival.priority,
            composition=tuple((digest or "", 1.0) for digest in (arrival.adapter, *arrival.others) if arrival.others),
        )
        key = (arrival.tenant, generate.model_key)
        turns = self._entrance.num_waiting_turns, self._entrance.max_turns_for(arrival.tenant)
        is_new = arrival.adapter is not None and all(adapter != key[1] for _, adapter in self._num_open)
        is_new = is_new and not self._entrance.hot.issuperset(generate.digests)
        try:
            is_hot = self._entrance.hot.issuperset(generate.digests)
            self._entrance.enter(*key, len(generate.digests), is_hot=is_hot)
        except QueueFullError as error:
            self.outcome.num_refused += 1
            self.outcome.refusals.append((*turns, True))
            if arrival.repeats or arrival.retries:
                self._push_again(arrival, error.retry_after_s or 1.0)
            return
        if is_new:
            self.outcome.refusals.append((*turns, False))
        self.outcome.num_accepted += 1
        self._arrival_of[generate.request_id] = arrival
        self._num_open[key] += 1
        if self._num_open[key] == 1:
            self._unserved_since[key] = self.now
            self._had_token.discard(key)
        self.scheduler.add(Request.from_generate(generate, number))

    def _step(self, plan: StepPlan) -> None:
        outcome = self.outcome
        self.now += self._machine.step_s + self._machine.token_s * plan.num_tokens
        outcome.num_steps += 1
        for entry in plan.scheduled:
            request = entry.request
            key = (request.tenant, request.adapter)
            prompt_left = request.num_prompt_tokens - request.num_computed_tokens
            if request.num_preemptions == 0 and prompt_left > 0:
                self._serve(request.tenant, PROMPT_TOKEN * min(entry.num_tokens, prompt_left))
            samples = entry.samples
            finish = self.scheduler.commit(entry, 7 if samples else None)
            if not samples:
                continue
            outcome.num_tokens += 1
            self._serve(request.tenant, OUTPUT_TOKEN)
            self._note_wait(key, self.now - self._unserved_since[key])
            self._unserved_since[key] = self.now
            self._had_token.add(key)
            if finish is not None:
                self._finish(key, self._arrival_of.pop(request.request_id))
        outcome.history.append((self.now, dict(outcome.service)))
        self._entrance.num_served_clients = self.scheduler.num_served_clients
        self._entrance.num_served_turns = self.scheduler.num_served_turns
        self._entrance.slot_turns = self.scheduler.slot_turns
        self._entrance.num_base_seats = self.scheduler.num_base_seats
        self._entrance.hot = self._slots.occupants()

    def _finish(self, key: Key, arrival: Arrival) -> None:
        self.outcome.num_finished += 1
        self._leave(key, arrival)
        if arrival.repeats:
            self._push_again(arrival, 0.0)

    def _leave(self, key: Key, arrival: Arrival) -> None:
        self._entrance.leave(*key, 1 + len(arrival.others))
        self._num_open[key] -= 1
        if not self._num_open[key]:
            del self._num_open[key], self._unserved_since[key]

    def _push_again(self, arrival: Arrival, after_s: float) -> None:
        heapq.heappush(self._arrivals, (self.now + after_s, next(self._numbers), arrival))

    def _serve(self, tenant: str, service: float) -> None:
        self.outcome.service[tenant] = self.outcome.service.get(tenant, 0.0) + service

    def _note_wait(self, key: Key, wait_s: float) -> None:
        outcome = self.outcome
        outcome.waits[key] = max(outcome.waits.get(key, 0.0), wait_s)
        if key not in self._had_token:
            outcome.first_waits[key] = max(outcome.first_waits.get(key, 0.0), wait_s)

    def _skip_to_next_event(self) -> bool:
        """Nothing can run: on to the next load's end or arrival. False if there is none."""
        events = [queue[0][0] for queue in (self._loads, self._reads, self._arrivals) if queue]
        if events:  # or when somebody may have waited for too long
            self.now = max(self.now, min(*events, self.now + 0.1))
        return bool(events)


def jain(shares: Iterable[float]) -> float:
    """Jain's index of fairness: 1 when all are equal, 1/n when one has everything."""
    values = list(shares)
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def largest_drift(history: list[tuple[float, dict[str, float]]], one: str, other: str, from_s: float) -> float:
    """By how much the service of two tenants differs at most, over any interval after `from_s`."""
    gaps = [service.get(one, 0.0) - service.get(other, 0.0) for at_s, service in history if at_s >= from_s]
    return max(gaps) - min(gaps) if gaps else 0.0
