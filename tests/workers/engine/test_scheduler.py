"""The scheduler as tables, and fuzzed: whatever arrives, everything ends, in bounded steps, and nothing leaks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafleet.workers.engine.adapter_slots import AdapterSlots
from lorafleet.workers.engine.block_pool import BlockPool
from lorafleet.workers.engine.request import FinishReason, GenerateRequest, Request, SamplingOptions
from lorafleet.workers.engine.scheduler import Scheduler, StepPlan
from lorafleet.workers.engine.turns import TURN_S

EOS = 1
PAGE = 4


class World:
    """A scheduler with a model that always says token 7 (or EOS where told) and adapters that load at once or later."""

    def __init__(
        self,
        *,
        pages: int = 64,
        slots: int = 2,
        max_num_seqs: int = 4,
        budget: int = 16,
        auto_load: bool = True,
        step_s: float = 1.0,
        max_wait_s: float = 0.0,
        max_bytes: int = 0,
        sizes: dict[str, int] | None = None,
        prefix_caching: bool = False,
    ) -> None:
        """`sizes`: bytes of adapters with an embedding or a head of their own, of which there may be `max_bytes`."""
        self.now = 0.0
        self.step_s = step_s
        self.slots = AdapterSlots(slots, max_bytes=max_bytes, bytes_of=lambda digest: (sizes or {}).get(digest, 0))
        self.scheduler = Scheduler(
            BlockPool(pages),
            self.slots,
            page_size=PAGE,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            eos_token_ids=frozenset([EOS]),
            max_wait_s=max_wait_s,
            enable_prefix_caching=prefix_caching,
            clock=lambda: self.now,
        )
        self.auto_load = auto_load
        self.finished: dict[str, FinishReason] = {}
        self.order: list[str] = []  # ids by first appearance in a step
        self._arrivals = 0

    def add(self, name: str, prompt: int, max_tokens: int = 4, adapter: str | None = None, **fields: Any) -> Request:
        """fields: of GenerateRequest."""
        self._arrivals += 1
        generate = GenerateRequest(name, (7,) * prompt, SamplingOptions(max_tokens=max_tokens), adapter, **fields)
        request = Request.from_generate(generate, self._arrivals)
        self.scheduler.add(request)
        return request

    def step(self, token: Callable[[Request], int] = lambda request: 7) -> StepPlan:
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        for entry in plan.scheduled:
            assert entry.num_tokens >= 1
            assert entry.slots == tuple(self.slots.slot_of(digest) for digest in entry.request.digests)
            if entry.request.request_id not in self.order:
                self.order.append(entry.request.request_id)
            reason = self.scheduler.commit(entry, token(entry.request) if entry.samples else None)
            if reason is not None:
                assert entry.request.request_id not in self.finished
                self.finished[entry.request.request_id] = reason
        self.now += self.step_s
        if self.auto_load:
            for load in plan.loads:
                self.slots.finish_load(load.digest)
        self.scheduler.check_integrity()
        return plan

    def run(self, max_steps: int = 10_000) -> int:
        for step in range(max_steps):
            if not self.scheduler.num_running and not self.scheduler.num_waiting:
                return step
            self.step()
        raise AssertionError(f"not done after {max_steps} steps")


def tokens(plan: StepPlan) -> dict[str, int]:
    return {entry.request.request_id: entry.num_tokens for entry in plan.scheduled}


def test_prefill_and_decode_share_a_step() -> None:
    world = World()
    world.add("a", 3)
    assert tokens(world.step()) == {"a": 3}
    world.add("b", 5)
    assert tokens(world.step()) == {"a": 1, "b": 5}


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    world = World(budget=8)
    world.add("a", 2, max_tokens=8)
    world.step()
    world.add("long", 20)
    assert [tokens(world.step()) for _ in range(4)] == [
        {"a": 1, "long": 7},
        {"a": 1, "long": 7},
        {"a": 1, "long": 6},
        {"a": 1, "long": 1},
    ]


def test_eos_stops_and_max_tokens_is_a_length() -> None:
    world = World()
    world.add("stops", 2)
    world.add("runs", 2, max_tokens=1)
    world.step(lambda request: EOS if request.request_id == "stops" else 7)
    assert world.finished == {"stops": FinishReason.STOP, "runs": FinishReason.LENGTH}


def test_the_youngest_is_preempted_and_recomputes_with_its_output() -> None:
    world = World(pages=4, max_num_seqs=2)
    old, young = world.add("old", 7, max_tokens=8), world.add("young", 7, max_tokens=5)
    world.step()  # 7 prompt tokens each: 2 pages each
    world.step()  # 8 tokens each
    plan = world.step()  # old needs a third page
    assert tokens(plan) == {"old": 1}
    assert world.scheduler.num_preemptions == 1
    assert young.num_computed_tokens == 0 and young.num_output_tokens == 2
    assert old.num_output_tokens == 3
    world.run()
    assert set(world.finished) == {"old", "young"}
    assert (old.num_output_tokens, young.num_output_tokens) == (8, 5)


def test_a_step_is_grouped_by_slot_with_the_base_model_first() -> None:
    world = World(slots=2, max_num_seqs=8, budget=64)
    for name, adapter in (("1", "x"), ("2", None), ("3", "y"), ("4", "x"), ("5", None)):
        world.add(name, 2, adapter=adapter)
    world.step()
    plan = world.step()
    slots = [entry.slots for entry in plan.scheduled]
    assert len(slots) == 5
    assert slots == sorted(slots)


def test_a_request_whose_adapter_loads_does_not_hold_up_the_others() -> None:
    world = World(auto_load=False)
    world.add("cold", 2, adapter="x")
    world.add("base", 2)
    plan = world.step()
    assert tokens(plan) == {"base": 2}
    assert [load.digest for load in plan.loads] == ["x"]
    assert not world.step().loads, "one load per adapter"
    world.slots.finish_load("x")
    assert "cold" in tokens(world.step())


def test_an_adapter_without_a_slot_claims_one_and_newcomers_for_the_claimed_one_wait() -> None:
    world = World(slots=1, max_num_seqs=8)
    world.add("x1", 2, max_tokens=6, adapter="x")
    world.step()
    world.step()
    world.add("y1", 2, max_tokens=2, adapter="y")
    world.step()
    for i in range(2, 6):
        world.add(f"x{i}", 2, max_tokens=6, adapter="x")
    world.run()
    assert world.order.index("y1") == 1, "no x that came after y1 had waited for a turn may start before it"


def test_until_a_turn_is_over_younger_requests_for_resident_adapters_fill_the_batch() -> None:
    world = World(slots=1, max_num_seqs=8, step_s=TURN_S / 4)
    world.add("x1", 2, max_tokens=20, adapter="x")
    world.step()
    world.step()
    world.add("y1", 2, max_tokens=2, adapter="y")
    for i in range(2, 8):
        world.add(f"x{i}", 2, max_tokens=20, adapter="x")
        world.step()
    world.run()
    assert world.order == ["x1", "x2", "x3", "x4", "x5", "y1", "x6", "x7"]


@pytest.mark.parametrize("step_s", [TURN_S, TURN_S / 5])
@pytest.mark.parametrize("num_adapters", [3, 16])
def test_a_stream_of_requests_for_resident_adapters_starves_nobody(num_adapters: int, step_s: float) -> None:
    world = World(slots=2, max_num_seqs=4, pages=200, step_s=step_s)
    world.add("hot0", 2, max_tokens=8, adapter="hot")
    for i in range(num_adapters):
        world.add(f"cold{i}", 2, max_tokens=8, adapter=f"cold{i}")
    started: set[str] = set()
    for step in range(40 * num_adapters):
        if step % 2 == 0:
            world.add(f"hot{step + 1}", 2, max_tokens=8, adapter="hot")
        world.step()
        started = set(world.order)
    assert {f"cold{i}" for i in range(num_adapters)} <= started


def test_one_that_waits_for_memory_beside_its_slot_holds_nobody_back() -> None:
    world = World(slots=4, pages=100, max_num_seqs=8, max_bytes=5, sizes={"half": 3, "whole": 5})
    world.add("first", 2, max_tokens=50, adapter="half")
    world.step()
    world.add("second", 2, max_tokens=2, adapter="whole")
    world.add("third", 2, max_tokens=2, adapter="plain")
    for _ in range(6):
        world.step()
    assert "third" in world.order and "second" not in world.order


@pytest.mark.parametrize("max_wait_s", [0.0, 30.0])
def test_a_stream_of_requests_for_resident_adapters_does_not_starve_one_that_needs_all_of_the_pool(
    max_wait_s: float,
) -> None:
    """Two others share the pool, and neither is idle for long; slots there are enough."""
    sizes = {"half": 3, "other half": 2, "whole": 5}
    world = World(slots=8, max_num_seqs=8, pages=200, max_wait_s=max_wait_s, max_bytes=5, sizes=sizes)
    for step in range(200):
        if step % 2 == 0:
            for adapter in ("half", "other half", "plain"):
                world.add(f"{adapter}{step}", 2, max_tokens=8, adapter=adapter)
        if step == 20:
            world.add("whole", 2, max_tokens=8, adapter="whole")
        world.step()
        if "whole" in world.order:
            return
    raise AssertionError("the adapter that needs the whole pool never ran")


def test_a_removed_request_gives_everything_back() -> None:
    world = World(slots=1)
    world.add("running", 5, adapter="x")
    world.step()
    world.step()
    world.add("waiting", 5, adapter="y")
    assert world.scheduler.remove("running") and world.scheduler.remove("waiting")
    assert not world.scheduler.remove("running")
    world.scheduler.check_integrity()
    assert not world.slots.is_pinned("x")
    assert world.scheduler.num_running == world.scheduler.num_waiting == 0


def test_a_failed_load_frees_its_slot() -> None:
    world = World(slots=1, auto_load=False)
    world.add("bad", 2, adapter="x")
    world.add("good", 2, adapter="y")
    (load,) = world.step().loads
    assert load.digest == "x"
    world.slots.fail_load("x")
    assert world.scheduler.waiting_for("x") == ["bad"]
    world.scheduler.remove("bad")
    assert [load.digest for load in world.step().loads] == ["y"]


def test_adapters_that_wait_for_a_slot_are_prefetched_once_oldest_first() -> None:
    world = World(slots=2, max_num_seqs=8)
    for name in ("x1", "y1"):
        world.add(name, 2, max_tokens=20, adapter=name[0])
    assert world.step().prefetches == (), "these have slots to be loaded into"
    world.step()
    for name, adapter in (("base", None), ("c1", "c"), ("x2", "x"), ("a1", "a"), ("c2", "c"), ("b1", "b")):
        world.add(name, 2, max_tokens=20, adapter=adapter)
    assert world.step().prefetches == ("c", "a"), "no more than there are slots"
    assert world.step().prefetches == ()
    world.scheduler.remove("a1")
    assert world.step().prefetches == ("b",), "the next one moves up"
    world.add("a2", 2, max_tokens=20, adapter="a")
    world.scheduler.remove("b1")
    assert world.step().prefetches == ("a",), "nobody waited for it in between"


def test_an_adapter_that_gets_its_slot_in_this_step_is_not_prefetched() -> None:
    world = World(slots=1, auto_load=False)
    world.add("cold", 2, adapter="x")
    world.add("other", 2, adapter="y")
    plan = world.step()
    assert ([load.digest for load in plan.loads], plan.prefetches) == (["x"], ("y",))
    assert world.step().prefetches == ()


def test_adapters_that_rank_before_the_next_request_are_loaded_while_no_seat_is_free() -> None:
    world = World(slots=2, max_num_seqs=2)
    for name, adapter in (("1", None), ("2", None), ("3", None), ("x", "x"), ("y", "y"), ("z", "z")):
        world.add(name, 2, max_tokens=20, adapter=adapter)
    plan = world.step()
    assert ([load.digest for load in plan.loads], plan.prefetches) == (["x", "y"], ("z",))
    assert tokens(plan) == {"1": 2, "2": 2}


def test_an_adapter_that_lost_its_slot_while_a_preempted_request_waits_is_prefetched() -> None:
    world = World(pages=4, slots=1, max_num_seqs=2, auto_load=False)
    world.add("old", 7, max_tokens=8)
    world.add("young", 7, max_tokens=5, adapter="x", priority=1)
    world.step()
    world.slots.finish_load("x")
    plans = [world.step() for _ in range(3)]
    assert world.scheduler.num_preemptions == 1
    assert all(plan.prefetches == () for plan in plans), "it is in its slot"
    assert world.slots.start_load("other") is not None
    assert world.step().prefetches == ("x",)


def test_the_base_models_requests_prefetch_nothing() -> None:
    world = World(slots=0, max_num_seqs=1)
    for name in "abc":
        world.add(name, 2)
    assert [world.step().prefetches for _ in range(3)] == [()] * 3


def test_lower_priority_is_served_earlier_whoever_came_first() -> None:
    world = World(max_num_seqs=1)
    world.add("running", 2, max_tokens=1)
    for name, priority in (("late", 5), ("normal", 0), ("early", -3), ("too", 0)):
        world.add(name, 2, max_tokens=1, priority=priority)
    world.run()
    assert world.order == ["early", "running", "normal", "too", "late"]


def test_a_tenant_that_floods_waits_behind_one_that_does_not() -> None:
    world = World(max_num_seqs=1)
    for number in range(6):
        world.add(f"flood{number}", 2, max_tokens=2, tenant="flood")
    world.step()
    for number in range(3):
        world.add(f"calm{number}", 2, max_tokens=2, tenant="calm")
    world.run()
    assert world.order[:6] == ["flood0", "calm0", "flood1", "calm1", "flood2", "calm2"]


def test_weights_divide_service_between_tenants_and_between_a_tenants_adapters() -> None:
    world = World(max_num_seqs=1, slots=2)
    for number in range(60):
        world.add(f"heavy{number}", 2, max_tokens=2, tenant="heavy", tenant_weight=3.0)
        world.add(f"light{number}", 2, max_tokens=2, tenant="light")
    for _ in range(80):
        world.step()
    served = [name[:5] for name in world.order[:40]]
    assert (served.count("heavy"), served.count("light")) == (30, 10)

    world = World(max_num_seqs=1, slots=2)
    for number in range(60):
        world.add(f"x{number}", 2, max_tokens=2, adapter="x", adapter_weight=3.0)
        world.add(f"b{number}", 2, max_tokens=2)
    for _ in range(81):
        world.step()
    served = [name[:1] for name in world.order[:40]]
    assert (served.count("x"), served.count("b")) == (30, 10)


def test_loads_are_shared_between_tenants_before_anybody_has_run() -> None:
    world = World(slots=4, max_num_seqs=8)
    for tenant in ("a", "b"):
        for number in range(4):
            world.add(f"{tenant}{number}", 2, adapter=f"{tenant}{number}", tenant=tenant)
    assert [load.digest for load in world.step().loads] == ["a0", "b0", "a1", "b1"]


def test_recomputation_is_not_charged_again() -> None:
    world = World(pages=4, max_num_seqs=2)
    world.add("old", 7, max_tokens=8, tenant="old")
    young = world.add("young", 7, max_tokens=5, tenant="young", priority=1)
    world.step()
    service = world.scheduler._clients._fairness.service
    assert service("young", None) == (9.0, 9.0)
    while not young.num_preemptions:
        world.step()
    assert service("young", None) == (11.0, 11.0)
    while young.num_output_tokens < 3:
        world.step()
    assert service("young", None) == (13.0, 13.0), "two output tokens and no prompt"


def test_pages_are_given_up_by_whom_has_had_most() -> None:
    world = World(pages=6, max_num_seqs=3, budget=32)
    world.add("a", 7, max_tokens=9, tenant="a")
    world.add("b1", 3, max_tokens=9, tenant="b")
    b2 = world.add("b2", 3, max_tokens=9, tenant="b")
    world.add("waits", 3, tenant="c", priority=9)
    while not world.scheduler.num_preemptions:
        world.step()
    assert b2.num_preemptions == 1, "b has had most, and b2 is its youngest"


def hold_all_slots(world: World, num_slots: int) -> None:
    for number in range(num_slots):
        world.add(f"holds{number}", 2, max_tokens=100, adapter=f"hot{number}")
    for _ in range(3):
        world.step()


def test_an_adapter_whose_time_runs_out_gets_the_slot_of_the_one_that_has_had_most() -> None:
    world = World(slots=2, max_wait_s=20.0, pages=200)
    world.add("more", 9, max_tokens=100, adapter="hot1")
    hold_all_slots(world, 2)
    began = world.now
    world.add("cold", 2, max_tokens=2, adapter="cold")
    while "cold" not in world.order:
        world.step()
    assert 17.0 <= world.now - began <= 20.0, "not before it must be, and in time"
    requests = world.scheduler._requests
    assert [requests[name].num_preemptions for name in ("more", "holds1", "holds0")] == [1, 1, 0]
    world.run()
    assert len(world.finished) == 4


def test_an_adapter_that_has_just_got_its_slot_keeps_it_for_a_turn() -> None:
    world = World(slots=1, max_wait_s=8.0, pages=200, step_s=0.125)
    for number in range(5):
        world.add(f"r{number}", 2, max_tokens=100, adapter=f"a{number}")
    began: dict[str, float] = {}
    for _ in range(200):
        before = world.now
        for entry in world.step().scheduled:
            began.setdefault(entry.request.request_id, before)
    times = sorted(began.values())
    assert len(times) == 5 and times[-1] <= 8.0
    assert all(later - earlier >= TURN_S for earlier, later in pairwise(times))


def test_nobody_gives_way_before_it_has_got_a_token() -> None:
    world = World(slots=1, max_wait_s=4.0, budget=4, pages=200, step_s=1.0)
    long = world.add("long", 40, max_tokens=5, adapter="hot")  # its prompt takes ten steps
    world.add("cold", 2, max_tokens=2, adapter="cold")
    while not long.num_preemptions:
        assert world.now <= 14.0
        world.step()
    assert long.num_output_tokens == 1
    world.run()
    assert world.scheduler.num_preemptions <= 7, "a new token for each"


def test_a_tenant_without_a_seat_gets_one_in_time() -> None:
    world = World(slots=0, max_num_seqs=2, max_wait_s=20.0, pages=200)
    for number in range(2):
        world.add(f"holds{number}", 2, max_tokens=100, tenant="holds")
    world.step()
    began = world.now
    world.add("comes", 2, max_tokens=2, tenant="comes", priority=7)
    while "comes" not in world.order:
        world.step()
    assert 17.0 <= world.now - began <= 20.0, "even if it ranks last"
    assert world.scheduler.num_preemptions == 1


def test_a_large_request_gets_pages_in_time() -> None:
    world = World(slots=0, max_num_seqs=8, max_wait_s=20.0, pages=40, budget=64)
    for number in range(7):
        world.add(f"holds{number}", 2, max_tokens=100, tenant="holds")
    world.step()
    began = world.now
    large = world.add("large", 80, max_tokens=2, tenant="large")
    for number in range(7, 20):
        world.add(f"holds{number}", 2, max_tokens=100, tenant="holds")
    while not large.num_output_tokens:
        world.step()
    assert world.now - began <= 20.0


def test_without_a_bound_running_requests_keep_their_slots() -> None:
    world = World(slots=2, pages=200)
    hold_all_slots(world, 2)
    world.add("cold", 2, max_tokens=2, adapter="cold")
    world.run()
    assert world.scheduler.num_preemptions == 0
    assert len(world.finished) == 3


REQUESTS = st.tuples(
    st.integers(1, 24),  # prompt
    st.integers(1, 12),  # max_tokens
    st.sampled_from([None, "a", "b", "c", "d", "e"]),  # adapter
    st.integers(0, 3),  # steps before the next arrival
    st.one_of(st.none(), st.integers(0, 20)),  # cancelled so many steps after its arrival
)


@settings(max_examples=300, deadline=None)
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=24),
    pages=st.integers(9, 40),
    slots=st.integers(1, 3),
    max_num_seqs=st.integers(1, 6),
    extra_budget=st.integers(0, 20),
    eos_every=st.integers(2, 9),
    step_s=st.sampled_from([0.1, 0.5, 1.0]),
    max_wait_s=st.sampled_from([0.0, 4.0, 60.0]),
    load_delay=st.integers(0, 3),
    max_bytes=st.integers(5, 10),
)
def test_whatever_arrives_everything_ends_once_and_nothing_leaks(
    requests: list[tuple[int, int, str | None, int, int | None]],
    pages: int,
    slots: int,
    max_num_seqs: int,
    extra_budget: int,
    eos_every: int,
    step_s: float,
    max_wait_s: float,
    load_delay: int,
    max_bytes: int,
) -> None:
    world = World(
        pages=pages,
        slots=slots,
        max_num_seqs=max_num_seqs,
        budget=max_num_seqs + extra_budget,
        auto_load=False,
        step_s=step_s,
        max_wait_s=max_wait_s,
        max_bytes=max_bytes,
        sizes={"c": 2, "d": 3, "e": 5},
    )
    cancels: dict[str, int] = {}
    removed: set[str] = set()
    loading: dict[str, int] = {}
    clock = 0

    def tick() -> None:
        nonlocal clock
        for name in [name for name, at in cancels.items() if at <= clock]:
            del cancels[name]
            if world.scheduler.remove(name):
                removed.add(name)
        for digest in [digest for digest, at in loading.items() if at <= clock]:
            del loading[digest]
            world.slots.finish_load(digest)
        plan = world.step(lambda request: EOS if (request.num_tokens + request.arrival) % eos_every == 0 else 7)
        for load in plan.loads:
            loading[load.digest] = clock + load_delay
        assert len(plan.prefetches) <= slots
        for digest in plan.prefetches:
            assert world.scheduler.waiting_for(digest)
            assert world.slots.slot_of(digest) is None and not world.slots.is_loading(digest)
        clock += 1

    for i, (prompt, max_tokens, adapter, gap, cancel_after) in enumerate(requests):
        world.add(f"r{i}", prompt, max_tokens, adapter)
        if cancel_after is not None:
            cancels[f"r{i}"] = clock + cancel_after
        for _ in range(gap):
            tick()
    limit = clock + 200 * len(requests)
    while world.scheduler.num_running or world.scheduler.num_waiting:
        tick()
        assert clock < limit, "no progress"
    assert removed.isdisjoint(world.finished)
    assert removed | world.finished.keys() == {f"r{i}" for i in range(len(requests))}
    assert world.scheduler._pool.num_free == pages
    assert not world.slots.is_pinned("x")


def pair(*digests: str, weight: float = 0.5) -> dict[str, Any]:
    """A composition, as fields of a request."""
    return {"composition": tuple((digest, weight) for digest in digests)}


def test_a_composition_takes_all_slots_at_once_or_none() -> None:
    world = World(slots=2, auto_load=False, step_s=0.01)
    world.add("single", 2, max_tokens=3, adapter="x")
    world.add("both", 2, **pair("a", "b"))
    world.add("behind", 2, adapter="y")
    assert [load.digest for load in world.step().loads] == ["x"]
    world.slots.finish_load("x")
    while "single" not in world.finished:
        assert world.step().loads == (), "the slot that is empty is not for one that ranks behind"
    plan = world.step()
    assert [load.digest for load in plan.loads] == ["a", "b"]
    world.slots.finish_load("b")
    assert world.step().scheduled == (), "one alone is of no use"
    world.slots.finish_load("a")
    (entry,) = world.step().scheduled
    assert entry.request.request_id == "both"
    assert entry.slots == (world.slots.slot_of("a"), world.slots.slot_of("b"))
    assert world.slots.is_pinned("a") and world.slots.is_pinned("b")
    world.scheduler.remove("both")
    assert not world.slots.is_pinned("a") and not world.slots.is_pinned("b")
    assert [load.digest for load in world.step().loads] == ["y"]


def test_compositions_that_each_have_what_another_lacks_take_turns() -> None:
    world = World(slots=2, max_num_seqs=8)
    for number in range(4):
        for composed in ("ab", "bc", "ca"):
            world.add(f"{composed}{number}", 2, max_tokens=3, **pair(*composed))
    assert world.run(200) < 60
    assert len(world.finished) == 12


def test_what_a_composition_finds_in_a_slot_stays_while_the_rest_is_loaded() -> None:
    world = World(slots=2, auto_load=False, step_s=0.01)
    world.add("first", 2, max_tokens=1, adapter="a")
    world.step()
    world.slots.finish_load("a")
    world.step()
    assert "first" in world.finished
    world.add("both", 2, **pair("a", "b"))
    assert [load.digest for load in world.step().loads] == ["b"]
    world.add("other", 2, adapter="c", priority=-1)
    for _ in range(3):
        assert world.step().loads == ()
    world.slots.finish_load("b")
    assert tokens(world.step()) == {"both": 2}


def test_a_request_for_the_same_adapters_with_other_weights_needs_no_load_and_is_another_client() -> None:
    world = World(slots=2, budget=64)
    world.add("1", 2, max_tokens=9, **pair("a", "b"))
    world.step()
    world.add("2", 2, max_tokens=9, **pair("b", "a"))
    world.add("3", 2, max_tokens=9, **pair("a", "b", weight=0.25))
    world.add("4", 2, max_tokens=9, adapter="b")
    plan = world.step()
    assert (plan.loads, len(plan.scheduled)) == ((), 4)
    assert world.scheduler.num_served_clients == 3
    assert [entry.request.request_id for entry in world.step().scheduled] == ["3", "1", "2", "4"], (
        "by slots and weights"
    )


def test_a_composition_that_is_passed_for_a_turn_claims_as_many_slots_as_it_lacks() -> None:
    world = World(slots=2, max_num_seqs=8, budget=64, step_s=0.25)
    for adapter in "xy":
        world.add(f"{adapter}0", 2, max_tokens=6, adapter=adapter, tenant="busy")
    world.step()
    world.add("both", 2, max_tokens=2, **pair("a", "b"))
    for number in range(1, 40):
        for adapter in "xy":
            world.add(f"{adapter}{number}", 2, max_tokens=6, adapter=adapter, tenant="busy")
        world.step()
        if "both" in world.finished:
            break
    assert number < 20
    assert world.scheduler.num_preemptions == 0


def test_a_composition_whose_time_is_running_out_has_all_its_slots_in_one_step() -> None:
    world = World(pages=64, slots=2, max_num_seqs=8, budget=64, step_s=0.25, max_wait_s=8.0)
    for adapter in "xy":
        for number in range(2):
            world.add(f"{adapter}{number}", 2, max_tokens=100, adapter=adapter, priority=-1)
    world.step()
    world.step()
    began = world.now
    both = world.add("both", 2, max_tokens=2, **pair("a", "b"))
    counts = []
    while not both.num_output_tokens:
        world.step()
        counts.append(world.scheduler.num_preemptions)
        assert world.now - began <= 8.0
    assert set(counts) == {0, 4}, "nobody gives way for a part of what it lacks"


def test_a_load_that_fails_is_told_to_every_composition_that_has_the_adapter() -> None:
    world = World(slots=2, auto_load=False)
    world.add("ab", 2, **pair("a", "b"))
    world.add("a", 2, adapter="a")
    world.add("bc", 2, **pair("b", "c"))
    assert [load.digest for load in world.step().loads] == ["a", "b"]
    assert world.scheduler.waiting_for("b") == ["ab", "bc"]
    assert world.scheduler.waiting_for("a") == ["ab", "a"]
    assert world.scheduler.uses("c") and not world.scheduler.uses("d")


def test_all_adapters_of_a_composition_are_prefetched() -> None:
    world = World(slots=2)
    world.add("1", 2, max_tokens=20, adapter="x")
    world.step()
    world.step()
    world.add("2", 2, **pair("a", "b"))
    assert world.step().prefetches == ("a", "b")
