"""Adapters that hold slots do not keep others out forever, even without a wait limit."""

from __future__ import annotations

import pytest
from scheduling import World, pair

from lorafleet.workers.scheduling.turns import TURN_S


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
def test_a_stream_of_requests_for_resident_adapters_starves_no_other(num_adapters: int, step_s: float) -> None:
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


def test_an_adapter_that_waits_for_memory_beside_its_slot_delays_no_other() -> None:
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
    """Two other adapters share the pool, and neither is idle for long; there are enough slots."""
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
