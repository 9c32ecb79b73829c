"""The choice of requests to preempt: if pages run out, and for flows near their wait limit."""

from __future__ import annotations

from itertools import pairwise

from scheduling import World, pair, tokens

from lorafleet.workers.scheduling.turns import TURN_S


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


def test_the_flow_that_has_received_the_most_gives_up_pages() -> None:
    world = World(pages=6, max_num_seqs=3, budget=32)
    world.add("a", 7, max_tokens=9, tenant="a")
    world.add("b1", 3, max_tokens=9, tenant="b")
    b2 = world.add("b2", 3, max_tokens=9, tenant="b")
    world.add("waits", 3, tenant="c", priority=9)
    while not world.scheduler.num_preemptions:
        world.step()
    assert b2.num_preemptions == 1, "b has received the most, and b2 is its youngest"


def hold_all_slots(world: World, num_slots: int) -> None:
    for number in range(num_slots):
        world.add(f"holds{number}", 2, max_tokens=100, adapter=f"hot{number}")
    for _ in range(3):
        world.step()


def wait_for_cold(world: World) -> dict[str, int]:
    """Request a cold adapter until the request has begun. Return how often each other request was preempted."""
    began = world.now
    world.add("cold", 2, max_tokens=2, adapter="cold")
    while "cold" not in world.order:
        world.step()
    assert 17.0 <= world.now - began <= 20.0, "not before it must be, and in time"
    others = [request for request in world.scheduler._requests.values() if request.request_id != "cold"]
    return {request.request_id: request.num_preemptions for request in others}


def test_an_adapter_near_its_wait_limit_gets_the_slot_of_the_one_that_has_received_the_most() -> None:
    world = World(slots=2, max_wait_s=20.0, pages=200)
    hold_all_slots(world, 2)
    for _ in range(5):
        world.scheduler._flows.charge_output(world.scheduler._requests["holds1"], world.now)
    assert wait_for_cold(world) == {"holds0": 0, "holds1": 1}
    world.run()
    assert len(world.finished) == 3


def test_if_that_would_leave_seats_empty_the_slot_that_fewest_requests_use_is_taken() -> None:
    world = World(slots=2, max_wait_s=20.0, pages=200)
    world.add("more", 9, max_tokens=100, adapter="hot1")
    hold_all_slots(world, 2)
    assert wait_for_cold(world) == {"more": 0, "holds0": 1, "holds1": 0}
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


def test_no_request_is_preempted_before_it_has_produced_a_token() -> None:
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


def test_without_a_wait_limit_running_requests_keep_their_slots() -> None:
    world = World(slots=2, pages=200)
    hold_all_slots(world, 2)
    world.add("cold", 2, max_tokens=2, adapter="cold")
    world.run()
    assert world.scheduler.num_preemptions == 0
    assert len(world.finished) == 3


def test_a_composition_near_its_wait_limit_gets_all_its_slots_in_one_step() -> None:
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
    assert set(counts) == {0, 4}, "none is preempted for a part of what it lacks"


def test_adapters_turns_leave_the_base_model_its_part_of_the_seats() -> None:
    world = World(slots=3, max_num_seqs=4, max_wait_s=8.0, pages=800, step_s=0.125)
    for number in range(4):
        world.add(f"base{number}", 2, max_tokens=500, tenant="b")
    world.step()
    for number in range(3):
        world.add(f"a{number}", 2, max_tokens=500, tenant="t", adapter=f"a{number}")
    plans = [world.step() for _ in range(300)]
    num_base = [sum(entry.request.adapter is None for entry in plan.scheduled) for plan in plans]
    assert min(num_base) == 2, "one of two tenants"
    assert all(f"a{number}" in world.order for number in range(3))


def test_turns_of_adapters_with_one_request_cost_busier_ones_at_most_a_fifth() -> None:
    world = World(slots=2, max_num_seqs=16, max_wait_s=16.0, pages=4000, budget=2048, step_s=0.125)
    for number in range(16):
        world.add(f"holds{number}", 2, max_tokens=2000, adapter=f"hot{number % 2}", tenant="holds")
    for _ in range(3):
        world.step()
    for number in range(2):
        world.add(f"cold{number}", 2, max_tokens=2000, adapter=f"cold{number}", tenant="wants")
    num_scheduled = [len(world.step().scheduled) for _ in range(400)]
    assert sum(num_scheduled) >= 0.8 * 16 * len(num_scheduled)
    assert {"cold0", "cold1"} <= set(world.order)
    assert min(num_scheduled) < 16, "there were turns"


def test_while_slots_are_gathered_for_a_composition_an_adapter_that_has_just_come_starts_its_requests() -> None:
    world = World(slots=2, max_num_seqs=1, max_wait_s=8.0, step_s=0.2)
    world.add("x", 2, max_tokens=30, adapter="x")
    world.step()
    world.add("both", 2, max_tokens=2, priority=1, **pair("b", "d"))
    while world.now < 5.8:
        world.step()
    world.add("c", 2, max_tokens=2, adapter="c")  # ranks first, and gets the free slot while x has the only seat
    while len(world.finished) < 3:
        plan = world.step()
        assert plan.scheduled or plan.loads
    assert world.order == ["x", "c", "both"]


def test_while_slots_are_gathered_a_composition_with_an_adapter_that_has_just_come_starts() -> None:
    world = World(slots=2, max_num_seqs=1, max_wait_s=8.0, step_s=0.2)
    world.add("b", 2, max_tokens=30, adapter="b")
    world.step()
    world.add("both", 2, max_tokens=2, priority=1, **pair("d", "e"))
    while world.now < 5.8:
        world.step()
    world.add("a and b", 2, max_tokens=2, **pair("a", "b"))
    while len(world.finished) < 3:
        plan = world.step()
        assert plan.scheduled or plan.loads
    assert world.order == ["b", "a and b", "both"]
