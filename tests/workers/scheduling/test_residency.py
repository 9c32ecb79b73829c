"""Loads and their order, announcements to the host cache, and compositions, which get all their slots or none."""

from __future__ import annotations

import pytest
from scheduling import World, pair, tokens


def test_loads_are_shared_between_tenants_before_anybody_has_run() -> None:
    world = World(slots=4, max_num_seqs=8)
    for tenant in ("a", "b"):
        for number in range(4):
            world.add(f"{tenant}{number}", 2, adapter=f"{tenant}{number}", tenant=tenant)
    assert [load.digest for load in world.step().loads] == ["a0", "b0", "a1", "b1"]


def test_adapters_that_rank_before_the_next_request_are_loaded_while_no_seat_is_free() -> None:
    world = World(slots=2, max_num_seqs=2)
    for name, adapter in (("1", None), ("2", None), ("3", None), ("x", "x"), ("y", "y"), ("z", "z")):
        world.add(name, 2, max_tokens=20, adapter=adapter)
    plan = world.step()
    assert ([load.digest for load in plan.loads], plan.prefetches) == (["x", "y"], ("z",))
    assert tokens(plan) == {"1": 2, "2": 2}


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
    assert world.step().prefetches == ("a",), "no request waited for it in between"


def test_an_adapter_that_gets_its_slot_in_this_step_is_not_prefetched() -> None:
    world = World(slots=1, auto_load=False)
    world.add("cold", 2, adapter="x")
    world.add("other", 2, adapter="y")
    plan = world.step()
    assert ([load.digest for load in plan.loads], plan.prefetches) == (["x"], ("y",))
    assert world.step().prefetches == ()


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


def test_a_composition_takes_all_slots_at_once_or_none() -> None:
    world = World(slots=2, auto_load=False, step_s=0.01)
    world.add("single", 2, max_tokens=3, adapter="x")
    world.add("both", 2, **pair("a", "b"))
    world.add("after", 2, adapter="y")
    assert [load.digest for load in world.step().loads] == ["x"]
    world.slots.finish_load("x")
    while "single" not in world.finished:
        assert world.step().loads == (), "the empty slot is not for a request of lower rank"
    plan = world.step()
    assert [load.digest for load in plan.loads] == ["a", "b"]
    world.slots.finish_load("b")
    assert world.step().scheduled == (), "one alone is of no use"
    world.slots.finish_load("a")
    (entry,) = world.step().scheduled
    assert entry.request.request_id == "both"
    assert entry.slots == (world.slots.slot_of("a"), world.slots.slot_of("b"))
    assert world.slots.is_in_use("a") and world.slots.is_in_use("b")
    world.scheduler.remove("both")
    assert not world.slots.is_in_use("a") and not world.slots.is_in_use("b")
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


def test_a_request_for_the_same_adapters_with_other_weights_needs_no_load_and_is_another_flow() -> None:
    world = World(slots=2, budget=64)
    world.add("1", 2, max_tokens=9, **pair("a", "b"))
    world.step()
    world.add("2", 2, max_tokens=9, **pair("b", "a"))
    world.add("3", 2, max_tokens=9, **pair("a", "b", weight=0.25))
    world.add("4", 2, max_tokens=9, adapter="b")
    plan = world.step()
    assert (plan.loads, len(plan.scheduled)) == ((), 4)
    assert world.scheduler.num_served_flows == 3
    assert [entry.request.request_id for entry in world.step().scheduled] == ["3", "1", "2", "4"], (
        "by slots and weights"
    )


def test_a_load_that_fails_is_told_to_every_composition_that_has_the_adapter() -> None:
    world = World(slots=2, auto_load=False)
    world.add("ab", 2, **pair("a", "b"))
    world.add("a", 2, adapter="a")
    world.add("bc", 2, **pair("b", "c"))
    assert [load.digest for load in world.step().loads] == ["a", "b"]
    assert world.scheduler.waiting_for("b") == ["ab", "bc"]
    assert world.scheduler.waiting_for("a") == ["ab", "a"]
    assert world.scheduler.waiting_for("c") == ["bc"] and not world.scheduler.waiting_for("d")


def test_all_adapters_of_a_composition_are_prefetched() -> None:
    world = World(slots=2)
    world.add("1", 2, max_tokens=20, adapter="x")
    world.step()
    world.step()
    world.add("2", 2, **pair("a", "b"))
    assert world.step().prefetches == ("a", "b")


def test_an_adapter_gets_a_slot_when_it_is_in_host_memory_and_not_before() -> None:
    world = World(slots=1, host=set())
    world.add("1", 2, adapter="x")
    plan = world.step()
    assert (plan.loads, plan.prefetches) == ((), ("x",))
    assert world.step().prefetches == (), "it is asked for once"
    world.scheduler.come("x")
    assert [load.digest for load in world.step().loads] == ["x"]


def test_an_adapter_evicted_from_host_memory_before_its_load_still_gets_its_slot() -> None:
    """Host memory may be too small for all adapters of a composition at once."""
    host: set[str] = set()
    world = World(slots=2, host=host)
    world.add("both", 2, **pair("a", "b"))
    assert world.step().prefetches == ("a", "b")
    world.scheduler.come("a")
    assert world.step().loads == ()
    assert world.scheduler.need_of("a") > world.scheduler.need_of("b"), "it is not the first to be evicted"
    world.scheduler.come("b")
    assert [load.digest for load in world.step().loads] == ["a", "b"]


def test_what_has_come_is_forgotten_with_the_requests_that_wanted_it() -> None:
    world = World(slots=1, host=set())
    world.add("1", 2, adapter="x")
    world.step()
    world.scheduler.come("x")
    world.scheduler.remove("1")
    world.step()
    assert not world.scheduler.need_of("x")
    world.add("2", 2, adapter="x")
    plan = world.step()
    assert (plan.loads, plan.prefetches) == ((), ("x",))


def test_adapters_whose_reads_hang_take_neither_slots_nor_the_places_of_others() -> None:
    world = World(slots=2, max_num_seqs=8, host=set(), max_wait_s=30.0, budget=64, pages=400)
    for number in range(2):
        world.add(f"hot{number}", 2, max_tokens=300, adapter=f"hot{number}")
        world.scheduler.come(f"hot{number}")
    for _ in range(3):
        world.step()
    for number in range(6):
        world.add(f"hung{number}", 2, adapter=f"hung{number}", priority=-1)
    world.add("base", 2, max_tokens=300)
    asked = set(world.step().prefetches)
    for _ in range(60):
        plan = world.step()
        asked.update(plan.prefetches)
        assert {"hot0", "hot1", "base"} <= tokens(plan).keys(), "none is preempted"
        assert not plan.loads
    assert world.scheduler.num_preemptions == 0
    assert asked == {f"hung{number}" for number in range(6)}, "those that take long do not keep others from being read"
    world.scheduler.come("hung3")
    while "hung3" not in world.order:
        world.step()
    assert world.scheduler.num_preemptions == 1


@pytest.mark.parametrize("max_wait_s", [0.0, 10.0])
def test_what_could_not_begin_in_time_is_named_once_it_is_too_late(max_wait_s: float) -> None:
    world = World(slots=1, host=set(), max_wait_s=max_wait_s)
    world.add("base", 2, max_tokens=100)
    world.add("x1", 2, adapter="x")
    world.step()
    world.now = 5.0
    world.add("x2", 2, adapter="x")
    world.add("y", 2, adapter="y")
    world.step()
    assert world.scheduler.overdue() == [] and not world.scheduler.is_overdue
    world.now = 10.0
    world.step()
    assert world.scheduler.is_overdue == bool(max_wait_s)
    overdue = world.scheduler.overdue()
    assert sorted(overdue) == (["x1", "x2"] if max_wait_s else []), "the place in line is the flow's"
    for name in overdue:
        world.scheduler.remove(name)
    world.step()
    assert world.scheduler.overdue() == []


def test_a_request_that_has_begun_is_never_given_up() -> None:
    world = World(slots=1, max_num_seqs=1, max_wait_s=8.0)
    begun = world.add("begun", 2, max_tokens=100, adapter="x")
    world.add("other", 2, max_tokens=100, adapter="y")
    while "other" not in world.order:
        world.step()
    assert begun.num_preemptions == 1
    world.add("second", 2, adapter="x")
    world.now += 100.0
    assert world.scheduler.overdue() == ["second"]
