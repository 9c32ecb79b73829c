"""Many workers on a virtual clock: simulates how a routing policy serves a trace of requests.

A policy sees the gateway's own `WorkerView` and `PrefixMemory`, with the same delay as there: heartbeats arrive every
half second, and each gateway knows only its own requests. A worker is modelled: steps that take time for each sequence
and each prompt token, seats, slots, a host tier, loads in parallel to the steps, and a prefix cache. Seconds are the
virtual clock's.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from lorafleet.controller.gateway.routing.demand import Demand
from lorafleet.controller.gateway.routing.prefix_memory import BLOCK, PrefixMemory
from lorafleet.controller.gateway.routing.router import Wanted
from lorafleet.controller.gateway.routing.worker_view import Tier, WorkerView
from lorafleet.workers.scheduling.pace import Pace

HEARTBEAT_S = 0.5
NUM_GATEWAYS = 4

Policy = Callable[[Sequence[WorkerView], Wanted, random.Random], int]  # → index of the worker


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace. Its prompt begins with a prefix that all requests for its adapter share."""

    at_s: float
    adapter: str  # empty: the base model
    num_shared: int
    num_own: int  # further prompt tokens
    num_output: int
    counts: bool = True  # False: it only warms up

    @property
    def num_prompt(self) -> int:
        return self.num_shared + self.num_own


@dataclass(frozen=True, slots=True)
class WorkerModel:
    """A worker's resources and times."""

    num_seats: int = 32
    num_slots: int = 32
    num_host: int = 64  # adapters
    num_prefixes: int = 64
    max_num_batched_tokens: int = 2048
    step_s: float = 0.02
    sequence_s: float = 0.0002  # added for each sequence in a step
    prompt_token_s: float = 0.00005  # added for each prompt token
    host_load_s: float = 0.015
    disk_load_s: float = 0.5
    num_loaders: int = 4


@dataclass(slots=True)
class Outcome:
    """The results of the requests that count: seconds to the first token, tiers of adapters, prompts computed."""

    first_token_s: list[float] = field(default_factory=list)
    found: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0

    def percentile(self, share: float) -> float:
        """Return the time to first token that `share` of the requests did not exceed."""
        ordered = sorted(self.first_token_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(slots=True, eq=False)
class _Request:
    arrival: Arrival
    num_uncomputed: int = 0
    started_at: float = 0.0


class _Tiers(dict[str, Tier]):
    """The tiers of a worker that knows all adapters: those not listed are on its disk."""

    def get(self, adapter: str, default: Any = None) -> Any:
        return super().get(adapter, Tier.DISK)


class _Worker:
    """One worker. Its owner calls `add`, `begin_step` and `end_step`, `start_loads` and `loaded` at their times."""

    def __init__(self, number: int, model: WorkerModel, slowdown: float) -> None:
        self.name = f"worker-{number}"
        self.model = model
        self.slowdown = slowdown
        self.waiting: deque[_Request] = deque()
        self.prompts: list[_Request] = []  # requests with a seat but no token yet
        self.num_decoding = 0
        self.steps = False  # whether a step is running
        self._num_steps = 0
        self._ends: list[tuple[int, int, _Request]] = []  # (step, number, request), of decoding requests
        self._numbers = count()
        self.device: OrderedDict[str, int] = OrderedDict()  # adapter → requests with a seat; LRU
        self.host: OrderedDict[str, None] = OrderedDict()
        self.loading: set[str] = set()
        self._num_loads = 0
        self.prefixes: OrderedDict[str, None] = OrderedDict()
        self._finished: list[_Request] = []
        self._seat_s = 0.0

    @property
    def num_running(self) -> int:
        return len(self.prompts) + self.num_decoding

    def tier(self, adapter: str) -> Tier:
        if adapter in self.device:
            return Tier.DEVICE
        return Tier.HOST if adapter in self.host or adapter in self.loading else Tier.DISK

    def report(self, view: WorkerView) -> WorkerView:
        """Return the view that a heartbeat reports."""
        model, slowdown = self.model, self.slowdown
        tiers = _Tiers(dict.fromkeys(self.host, Tier.HOST))
        tiers.update(dict.fromkeys(self.loading, Tier.HOST))
        tiers.update(dict.fromkeys(self.device, Tier.DEVICE))
        step_s = slowdown * (model.step_s + model.sequence_s * self.num_running)
        return replace(
            view,
            num_running=self.num_running,
            num_waiting=len(self.waiting),
            num_prompt_tokens=sum(request.num_uncomputed for request in (*self.waiting, *self.prompts)),
            pace=Pace(
                step_s,
                slowdown * model.prompt_token_s,
                self._seat_s,
                slowdown * model.host_load_s,
                slowdown * model.disk_load_s,
            ),
            tiers=tiers,
            num_device_adapters=len(self.device),
            host_usage=len(self.host) / self.model.num_host,
            expected=frozenset(),
            num_unreported=0,
            num_unreported_tokens=0,
        )

    def add(self, request: _Request) -> None:
        self.waiting.append(request)

    def start_loads(self) -> list[tuple[float, str]]:
        """Return the loads that begin now, as (duration, adapter), for waiting requests in order of arrival."""
        started = []
        wanted = {request.arrival.adapter for request in self.waiting}
        for request in self.waiting:
            adapter = request.arrival.adapter
            if not adapter or adapter in self.device or adapter in self.loading:
                continue
            if self._num_loads == self.model.num_loaders:
                break
            if len(self.device) + len(self.loading) >= self.model.num_slots:
                idle = [held for held, users in self.device.items() if not users]
                idle = [held for held in idle if held not in wanted] or idle[:1]
                if not idle:
                    break
                del self.device[idle[0]]
            seconds = self.model.host_load_s if adapter in self.host else self.model.disk_load_s
            self.loading.add(adapter)
            self._num_loads += 1
            started.append((seconds * self.slowdown, adapter))
        return started

    def loaded(self, adapter: str) -> None:
        self._num_loads -= 1
        self.loading.discard(adapter)
        self.device[adapter] = 0
        self._touch(self.host, adapter, self.model.num_host)

    def begin_step(self, now: float) -> float | None:
        """Return the duration of the step that begins now; None if there is nothing to do."""
        self._let_in(now)
        if not self.num_running:
            self.steps = False
            return None
        budget = self.model.max_num_batched_tokens - self.num_decoding
        num_tokens = 0
        self._finished = []
        for request in list(self.prompts):
            part = min(request.num_uncomputed, budget)
            request.num_uncomputed -= part
            budget -= part
            num_tokens += part
            if not request.num_uncomputed:
                self.prompts.remove(request)
                self._finished.append(request)
            if budget <= 0:
                break
        self.steps = True
        num_rows = self.num_decoding + len(self._finished)
        model = self.model
        return self.slowdown * (model.step_s + model.sequence_s * num_rows + model.prompt_token_s * num_tokens)

    def end_step(self, now: float) -> list[_Request]:
        """Return the requests that have got their first token."""
        self._num_steps += 1
        for request in self._finished:
            self.num_decoding += 1
            end = self._num_steps + request.arrival.num_output - 1
            heapq.heappush(self._ends, (end, next(self._numbers), request))
        while self._ends and self._ends[0][0] <= self._num_steps:
            request = heapq.heappop(self._ends)[2]
            self.num_decoding -= 1
            self._seat_s += (
                0.05 * (now - request.started_at - self._seat_s) if self._seat_s else now - request.started_at
            )
            if request.arrival.adapter:
                self.device[request.arrival.adapter] -= 1
        return self._finished

    def _let_in(self, now: float) -> None:
        passed: list[_Request] = []
        while self.waiting and self.num_running < self.model.num_seats:
            request = self.waiting.popleft()
            adapter = request.arrival.adapter
            if adapter and adapter not in self.device:
                passed.append(request)
                continue
            if adapter:
                self.device[adapter] += 1
                self.device.move_to_end(adapter)
                self._touch(self.host, adapter, self.model.num_host)
            request.started_at = now
            request.num_uncomputed = request.arrival.num_prompt
            if adapter in self.prefixes:
                request.num_uncomputed = request.arrival.num_own
            self._touch(self.prefixes, adapter, self.model.num_prefixes)
            self.prompts.append(request)
        self.waiting.extendleft(reversed(passed))

    @staticmethod
    def _touch(cache: OrderedDict[str, None], name: str, size: int) -> None:
        cache[name] = None
        cache.move_to_end(name)
        if len(cache) > size:
            cache.popitem(last=False)


class _Gateway:
    """The knowledge of one gateway."""

    def __init__(
        self, workers: Sequence[_Worker], num_prefixes: int, rng: random.Random, clock: Callable[[], float]
    ) -> None:
        self.rng = rng
        self.views = [
            WorkerView(
                worker.name,
                ready=True,
                suspect=False,
                max_num_seqs=worker.model.num_seats,
                max_loras=worker.model.num_slots,
            )
            for worker in workers
        ]
        self._demand = Demand(clock)
        self._max_tokens = num_prefixes * BLOCK
        self._prefixes = [PrefixMemory() for _ in workers]

    def choose(self, arrival: Arrival, policy: Policy, alive: Sequence[int]) -> int:
        """Send a request to a worker. Return the worker's number."""
        views = [self.views[number] for number in alive]
        prefix = [arrival.adapter.encode()]  # one block stands for the adapter's whole prefix
        cached = {
            self.views[number].worker_id: arrival.num_shared
            for number in alive
            if self._prefixes[number].num_found(prefix)
        }
        adapters = (arrival.adapter,) if arrival.adapter else ()
        num_recent = NUM_GATEWAYS * self._demand.book(arrival.adapter)
        number = alive[policy(views, Wanted(adapters, arrival.num_prompt, num_recent, cached), self.rng)]
        view = self.views[number]
        self.views[number] = replace(
            view,
            expected=view.expected | set(adapters),
            num_unreported=view.num_unreported + NUM_GATEWAYS,
            num_unreported_tokens=view.num_unreported_tokens
            + NUM_GATEWAYS * (arrival.num_prompt - cached.get(view.worker_id, 0)),
        )
        self._prefixes[number].note(prefix, self._max_tokens)
        return number


class Fleet:
    """The workers and gateways of one simulation; `run` it once."""

    def __init__(
        self, num_workers: int, model: WorkerModel, policy: Policy, *, slowdowns: dict[int, float], seed: int = 0
    ) -> None:
        """slowdowns: factors by which some workers are slower."""
        rng = random.Random(seed)
        self._rng = rng
        self._now = 0.0
        self._policy = policy
        self._workers = [_Worker(number, model, slowdowns.get(number, 1.0)) for number in range(num_workers)]
        self._gateways = [
            _Gateway(self._workers, model.num_prefixes, random.Random(seed + 1 + number), lambda: self._now)
            for number in range(NUM_GATEWAYS)
        ]
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()
        self.outcome = Outcome()

    def run(self, trace: Iterable[Arrival]) -> Outcome:
        """Play a trace, sorted by time, until all requests have their first token."""
        num_left = 0
        for number, _ in enumerate(self._workers):
            self._at(HEARTBEAT_S * self._rng.random(), self._beat, number)
        for arrival in trace:
            self._at(arrival.at_s, self._arrive, arrival)
            num_left += arrival.counts
        while len(self.outcome.first_token_s) < num_left:
            self._now, _, call, args = heapq.heappop(self._events)
            call(*args)
        return self.outcome

    def _at(self, time_s: float, call: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), call, args))

    def _beat(self, number: int) -> None:
        worker = self._workers[number]
        view = worker.report(self._gateways[0].views[number])
        for gateway in self._gateways:
            gateway.views[number] = view
        self._at(self._now + HEARTBEAT_S, self._beat, number)

    def _arrive(self, arrival: Arrival) -> None:
        gateway = self._rng.choice(self._gateways)
        worker = self._workers[gateway.choose(arrival, self._policy, range(len(self._workers)))]
        if arrival.counts:
            outcome = self.outcome
            if arrival.adapter:
                outcome.found[worker.tier(arrival.adapter)] += 1
            outcome.num_prompt_tokens += arrival.num_prompt
            outcome.num_cached_tokens += arrival.num_shared * (arrival.adapter in worker.prefixes)
        worker.add(_Request(arrival, arrival.num_prompt))
        self._go_on(worker)

    def _go_on(self, worker: _Worker) -> None:
        for seconds, adapter in worker.start_loads():
            self._at(self._now + seconds, self._loaded, worker, adapter)
        if not worker.steps and (seconds_or_none := worker.begin_step(self._now)) is not None:
            self._at(self._now + seconds_or_none, self._step_ended, worker)

    def _loaded(self, worker: _Worker, adapter: str) -> None:
        worker.loaded(adapter)
        self._go_on(worker)

    def _step_ended(self, worker: _Worker) -> None:
        for request in worker.end_step(self._now):
            if request.arrival.counts:
                self.outcome.first_token_s.append(self._now - request.arrival.at_s)
        worker.steps = False
        self._go_on(worker)
