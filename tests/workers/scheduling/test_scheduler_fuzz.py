"""The scheduler under everything at once: arrivals, cancels, failing loads, time, errors. All invariants must hold.

Pages, slots and seats are few, so that requests compete all the time.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lorafleet.workers.scheduling.adapter_slots import AdapterSlots
from lorafleet.workers.scheduling.batch import StepPlan
from lorafleet.workers.scheduling.block_pool import BlockPool
from lorafleet.workers.scheduling.request import GenerateRequest, Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions
from lorafleet.workers.scheduling.scheduler import Scheduler

PAGE = 4
EOS = 1


class Machine(RuleBasedStateMachine):
    """The rules are the possible actions of the loop, the loaders and the clock, in any order."""

    @initialize(
        pages=st.integers(10, 30),
        slots=st.integers(0, 3),
        seats=st.integers(1, 5),
        extra_budget=st.integers(0, 12),
        max_wait_s=st.sampled_from([0.0, 1.0, 8.0]),
        prefix_caching=st.booleans(),
        overlaps=st.booleans(),
    )
    def start(
        self,
        pages: int,
        slots: int,
        seats: int,
        extra_budget: int,
        max_wait_s: float,
        prefix_caching: bool,
        overlaps: bool,
    ) -> None:
        """overlaps: whether a step is planned before the previous step's tokens are known."""
        self.now = 0.0
        self.overlaps = overlaps
        self.in_flight: list[tuple[Request, int | None]] = []  # what was sampled; None: not finite
        self.tokens: dict[str, list[int]] = {}  # of each request, with those that the scheduler does not know yet
        self.pool = BlockPool(pages)
        self.slots = AdapterSlots(slots)
        self.scheduler = Scheduler(
            self.pool,
            self.slots,
            page_size=PAGE,
            max_num_seqs=seats,
            max_num_batched_tokens=seats + extra_budget,
            eos_token_ids=frozenset([EOS]),
            max_wait_s=max_wait_s,
            enable_prefix_caching=prefix_caching,
            clock=lambda: self.now,
        )
        self.requests: dict[str, Request] = {}  # unfinished
        self.owners: dict[str, object] = {}
        self.ended: dict[str, str] = {}
        self.loading: list[str] = []
        self.num_added = 0
        self.num_outputs = 0
        self.memory: dict[int, object] = {}  # place of a token → whose keys and values are there, and after what tokens

    @rule(
        prompt=st.one_of(
            st.integers(1, 20).map(lambda length: (7,) * length),  # many that begin alike
            st.lists(st.integers(5, 7), min_size=1, max_size=20).map(tuple),
        ),
        max_tokens=st.integers(1, 14),
        adapter=st.sampled_from([None, "a", "b", "c", "d", "e"]),
        composition=st.one_of(
            st.just({}),
            st.dictionaries(st.sampled_from("abcde"), st.sampled_from([1.0, 0.5, -2.0]), min_size=1, max_size=3),
        ),
        tenant=st.sampled_from(["", "t", "u"]),
        tenant_weight=st.sampled_from([0.5, 1.0, 3.0]),
        adapter_weight=st.sampled_from([1.0, 2.0]),
        priority=st.sampled_from([0, 0, 0, -1, 2]),
        cache_salt=st.sampled_from([None, None, "s"]),
        start=st.sampled_from([0, 0, 1, 3, 4, 9]),
    )
    def add(
        self,
        prompt: tuple[int, ...],
        max_tokens: int,
        adapter: str | None,
        composition: dict[str, float],
        start: int,
        **fields: Any,
    ) -> None:
        """start: the position where the adapter begins."""
        parts = tuple(composition.items())[: self.slots.num_slots]
        if not self.slots.num_slots or parts:
            adapter = None
        start = 0 if adapter is None else min(start, len(prompt) - 1)
        self.num_added += 1
        generate = GenerateRequest(
            f"r{self.num_added}",
            prompt,
            SamplingOptions(max_tokens=max_tokens),
            adapter,
            **fields,
            adapter_start=start,
            composition=parts,
        )
        request = Request.from_generate(generate, self.num_added)
        self.requests[request.request_id] = request
        self.tokens[request.request_id] = list(prompt)
        self.owners[request.request_id] = (generate.tenant, generate.cache_salt)
        self.scheduler.add(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self._end(data.draw(st.sampled_from(sorted(self.requests))), "cancelled")

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0, 5.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), fails=st.booleans())
    def end_a_load(self, data: st.DataObject, fails: bool) -> None:
        digest = self.loading.pop(data.draw(st.integers(0, len(self.loading) - 1)))
        if not fails:
            self.slots.finish_load(digest)
            return
        self.slots.fail_load(digest)
        for request_id in self.scheduler.waiting_for(digest):
            self._end(request_id, "failed")

    @rule(seconds=st.sampled_from([0.01, 0.2]), results=st.lists(st.sampled_from("7777E!"), min_size=5, max_size=5))
    def step(self, seconds: float, results: list[str]) -> None:
        """results: a token, EOS, or non-finite logits, for each request that samples."""
        plan = self.scheduler.schedule()
        self.now += seconds
        self.scheduler.check_integrity()
        assert sum(entry.num_tokens for entry in plan.scheduled) <= self.scheduler._max_num_batched_tokens
        assert len(plan.prefetches) <= self.slots.num_slots
        self._check_order(plan)
        self.loading += [load.digest for load in plan.loads]
        self._compute(plan)
        has_work = plan.scheduled or self.loading or self.in_flight or not self.requests
        assert has_work, "there is work that is not done"
        launched: list[tuple[Request, int | None]] = []
        for entry, result in zip(plan.scheduled, results, strict=False):
            request = entry.request
            assert entry.num_tokens >= 1
            assert request.num_computed_tokens + entry.num_tokens <= len(request.pages) * PAGE
            assert entry.slots == tuple(map(self.slots.slot_of, request.digests))
            if entry.samples:
                assert request.num_pending_tokens <= self.overlaps
                self.num_outputs += 1
                token = EOS if result == "E" else 7
                self.tokens[request.request_id].append(token)
                launched.append((request, None if result == "!" else token))
            self.scheduler.advance(entry)
        self.scheduler.check_integrity()
        self._settle()
        self.in_flight = launched
        if not self.overlaps:
            self._settle()

    def _settle(self) -> None:
        for request, token in self.in_flight:
            if not self.scheduler.holds(request):
                continue  # cancelled, or it had ended before
            if token is None:
                assert self.scheduler.remove(request.request_id, is_spoiled=True)
                self._note_end(request.request_id, "not finite")
            elif self.scheduler.settle(request, token) is not None:
                self._note_end(request.request_id, "finished")
            else:
                known = request.token_ids[: request.num_known_tokens]
                assert known == self.tokens[request.request_id][: len(known)]
        self.in_flight = []

    @invariant()
    def nothing_is_amiss(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            assert self.scheduler.num_preemptions <= self.num_outputs
            assert all(name in self.scheduler for name in self.requests)
            assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.requests)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        remaining = sum(len(request.token_ids) + request.sampling.max_tokens for request in self.requests.values())
        for _ in range(200 + 20 * remaining):
            if not self.requests:
                break
            for digest in self.loading:
                self.slots.finish_load(digest)
            self.loading.clear()
            self.step(0.2, ["7"] * 5)
        assert not self.requests, "no progress"
        assert len(self.ended) == self.num_added
        assert self.pool.num_free == self.pool.num_pages
        self.scheduler.check_integrity()

    def _compute(self, plan: StepPlan) -> None:
        """Act like the model: write all of the step, then read. Each request must read its own values or equal ones."""
        for entry in plan.scheduled:
            first = entry.request.num_computed_tokens
            for position in range(first, first + entry.num_tokens):
                self.memory[self._place(entry.request, position)] = self._content(entry.request, position)
        for entry in plan.scheduled:
            for position in range(entry.request.num_computed_tokens + entry.num_tokens):
                read = self.memory[self._place(entry.request, position)]
                assert read == self._content(entry.request, position)

    def _place(self, request: Request, position: int) -> int:
        return request.pages[position // PAGE] * PAGE + position % PAGE

    def _content(self, request: Request, position: int) -> object:
        computed_by = (request.adapter, request.adapter_start) if position >= request.adapter_start else (None, 0)
        return self.owners[request.request_id], computed_by, tuple(self.tokens[request.request_id][: position + 1])

    def _check_order(self, plan: StepPlan) -> None:
        """Check that an adapter's rows are adjacent, but for base rows before its first ones in a request."""
        rows: list[object] = []  # of each run of rows, the slots and weights
        num_parted: Counter[object] = Counter()
        for entry in plan.scheduled:
            start = entry.request.adapter_start
            own = entry.request.num_computed_tokens
            key = entry.slots, entry.request.weights
            keys = {key if place >= start else ((), ()) for place in range(own, own + entry.num_tokens)}
            num_parted[key] += len(keys) == 2
            for used in sorted(keys):
                if not rows or rows[-1] != used:
                    rows.append(used)
        runs = Counter(rows)
        assert all(runs[used] <= max(1, num_parted[used]) for used in runs if used != ((), ()))

    def _end(self, request_id: str, why: str) -> None:
        assert self.scheduler.remove(request_id)
        self._note_end(request_id, why)

    def _note_end(self, request_id: str, why: str) -> None:
        assert request_id not in self.ended
        self.ended[request_id] = why
        del self.requests[request_id]


TestScheduler = Machine.TestCase
TestScheduler.settings = settings(
    max_examples=120, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_adapters_whose_requests_were_preempted_do_not_take_a_slot_from_each_other_for_ever() -> None:
    """An example that the machine found: requests name the same adapters by several weights."""
    machine = Machine()
    machine.start(pages=10, slots=1, seats=2, extra_budget=9, max_wait_s=1.0, prefix_caching=True, overlaps=True)
    for adapter, weight, priority in [
        ("a", -2.0, 0),
        ("b", 1.0, 0),
        ("a", -2.0, 0),
        ("a", 1.0, -1),
        ("e", 1.0, 0),
        ("e", -2.0, 0),
        ("d", 0.5, 0),
        ("d", 1.0, 0),
        ("d", -2.0, 0),
        ("b", 0.5, -1),
        ("e", 0.5, 0),
    ]:
        is_alone = weight == 1.0
        machine.add(
            prompt=(7,),
            max_tokens=2 if priority and is_alone else 1,
            adapter=adapter if is_alone else None,
            composition={} if is_alone else {adapter: weight},
            tenant="t" if priority and is_alone else "",
            tenant_weight=1.0,
            adapter_weight=1.0,
            priority=priority,
            cache_salt=None,
            start=0,
        )
    machine.teardown()
