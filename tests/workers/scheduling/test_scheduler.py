"""The scheduler as tables, and fuzzed: whatever arrives, all requests end in bounded steps, and nothing leaks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import EOS, World, tokens

from lorafleet.workers.scheduling.flows import Flows
from lorafleet.workers.scheduling.request import FinishReason


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


def test_a_step_is_grouped_by_slot_with_the_base_model_first() -> None:
    world = World(slots=2, max_num_seqs=8, budget=64)
    for name, adapter in (("1", "x"), ("2", None), ("3", "y"), ("4", "x"), ("5", None)):
        world.add(name, 2, adapter=adapter)
    world.step()
    plan = world.step()
    slots = [entry.slots for entry in plan.scheduled]
    assert len(slots) == 5
    assert slots == sorted(slots)


def test_a_removed_request_gives_everything_back() -> None:
    world = World(slots=1)
    world.add("running", 5, adapter="x")
    world.step()
    world.step()
    world.add("waiting", 5, adapter="y")
    assert world.scheduler.remove("running") and world.scheduler.remove("waiting")
    assert not world.scheduler.remove("running")
    world.scheduler.check_integrity()
    assert not world.slots.is_in_use("x")
    assert world.scheduler.num_running == world.scheduler.num_waiting == 0


def test_one_tenants_prompt_takes_all_of_a_step_while_it_is_alone() -> None:
    world = World(budget=64, shared_budget=8)
    world.add("stream", 2, max_tokens=9, tenant="one")
    world.step()
    world.add("long", 40, tenant="one")
    assert tokens(world.step()) == {"stream": 1, "long": 40}


def test_another_tenants_prompt_is_computed_in_small_pieces_beside_a_stream() -> None:
    world = World(budget=64, shared_budget=8)
    world.add("stream", 2, max_tokens=9, tenant="one")
    world.step()
    world.add("long", 20, tenant="two")
    assert [tokens(world.step()) for _ in range(3)] == [
        {"stream": 1, "long": 7},
        {"stream": 1, "long": 7},
        {"stream": 1, "long": 6},
    ]


def test_another_tenants_prompts_do_not_keep_a_request_from_starting() -> None:
    world = World(budget=64, shared_budget=8)
    world.add("stream", 2, max_tokens=9, tenant="one")
    world.step()
    for number in range(3):
        world.add(f"long{number}", 40, tenant="two")
    world.step()
    world.add("short", 2, max_tokens=1, tenant="one")
    assert tokens(world.step()) == {"stream": 1, "long0": 5, "short": 2}, "a newcomer's share, and the rest"
    assert world.finished == {"short": FinishReason.LENGTH}
    assert tokens(world.step()) == {"stream": 1, "long0": 7}, "what no other tenant wants is used"


def test_a_newcomer_of_lower_priority_waits_for_prompts_under_way() -> None:
    world = World(budget=64, shared_budget=8)
    world.add("long", 30, tenant="two")
    world.add("late", 2, tenant="one", priority=1)
    assert [tokens(world.step()) for _ in range(3)] == [{"long": 8}] * 3


def test_streams_of_a_tenant_that_has_many_take_turns_beside_another_tenants() -> None:
    world = World(max_num_seqs=8, budget=64, shared_budget=4, pages=128)
    for number in range(6):
        world.add(f"many{number}", 2, max_tokens=100, tenant="many")
    world.step()
    world.add("one", 2, max_tokens=100, tenant="one")
    while not world.finished.keys() and "one" not in world.order:
        world.step()
    plans = [tokens(world.step()) for _ in range(6)]
    assert all(plan.get("one") == 1 and sum(plan.values()) == 4 for plan in plans)
    counts = Counter(name for plan in plans for name in plan if name != "one")
    assert set(counts.values()) == {3}, "six streams in three places, for six steps"


def test_a_tenant_with_many_streams_can_begin_one_more() -> None:
    world = World(max_num_seqs=16, budget=64, shared_budget=8, pages=256)
    for number in range(12):
        world.add(f"many{number}", 2, max_tokens=100, tenant="many")
    world.step()
    world.add("one", 2, max_tokens=100, tenant="one")
    world.add("another", 20, max_tokens=100, tenant="many")
    for _ in range(30):
        world.step()
    assert "another" in world.order
    assert world.scheduler.num_uncomputed_tokens == 0


def test_lower_priority_is_served_earlier_whoever_came_first() -> None:
    world = World(max_num_seqs=1)
    world.add("running", 2, max_tokens=1)
    for name, priority in (("late", 5), ("normal", 0), ("early", -3), ("too", 0)):
        world.add(name, 2, max_tokens=1, priority=priority)
    world.run()
    assert world.order == ["early", "running", "normal", "too", "late"]


def test_a_tenant_that_floods_waits_after_one_that_does_not() -> None:
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


def test_recomputation_is_not_charged_again() -> None:
    world = World(pages=4, max_num_seqs=2)
    world.add("old", 7, max_tokens=8, tenant="old")
    young = world.add("young", 7, max_tokens=5, tenant="young", priority=1)
    world.step()
    service = world.scheduler._flows._fairness.service
    assert service("young", None) == (9.0, 9.0)
    while not young.num_preemptions:
        world.step()
    assert service("young", None) == (11.0, 11.0)
    while young.num_output_tokens < 3:
        world.step()
    assert service("young", None) == (13.0, 13.0), "two output tokens and no prompt"


REQUESTS = st.tuples(
    st.integers(1, 24),  # prompt
    st.integers(1, 12),  # max_tokens
    st.sampled_from([None, "a", "b", "c", "d", "e"]),  # adapter
    st.integers(0, 3),  # steps before the next arrival
    st.one_of(st.none(), st.integers(0, 20)),  # steps from arrival to cancellation
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
    assert world.pool.num_free == pages
    assert not world.slots.is_in_use("x")


def test_waiting_requests_are_looked_at_again_only_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look costs most of a step with thousands of adapters, and in most steps no request can start."""
    world = World(slots=1, max_num_seqs=2, step_s=0.001)
    looks = 0
    hot = Flows.hot

    def counted(flows: Flows) -> dict[str, tuple[str, ...]]:
        nonlocal looks
        looks += 1
        return hot(flows)

    monkeypatch.setattr(Flows, "hot", counted)
    world.add("runs", prompt=2, max_tokens=40, adapter="x")
    world.add("waits", prompt=2, max_tokens=40, adapter="y")
    for _ in range(3):
        world.step()
    before = looks
    for _ in range(20):
        assert len(world.step().scheduled) == 1
    assert looks == before
    world.add("is let in", prompt=2, max_tokens=40, adapter="x")
    assert len(world.step().scheduled) == 2
    world.scheduler.remove("runs")
    world.scheduler.remove("is let in")
    world.step()
    assert [entry.request.request_id for entry in world.step().scheduled] == ["waits"]
    before = looks
    world.now += 10.0
    world.step()
    assert looks > before, "a change that only time makes is found too"
