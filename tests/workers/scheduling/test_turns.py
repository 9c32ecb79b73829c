"""The wait limit's arithmetic: when a flow is near its limit, and how many may wait."""

from __future__ import annotations

import pytest

from lorafleet.workers.errors import QueueFullError
from lorafleet.workers.scheduling.turns import COST, AdmissionControl, Line, SlotPace, SlotTurns, WaitBound

BOUND = WaitBound(max_wait_s=10.0, num_slots=2, num_seats=4)  # turns of a second; two adapters a turn


def line(*since: float, bound: WaitBound = BOUND) -> Line[int]:
    waiting: Line[int] = Line(bound.num_adapter_places, bound)
    for item, at in enumerate(since):
        waiting.put(item, at)
    waiting.check_integrity()
    return waiting


@pytest.mark.parametrize(
    ("since", "now", "due"),
    [
        ([], 100.0, []),
        ([0.0], 7.9, []),
        ([0.0], 8.0, [0]),  # a turn for the holders, one for its own first token
        ([0.0, 1.0], 8.0, [0]),
        ([0.0, 0.0, 0.0], 6.9, []),
        ([0.0, 0.0, 0.0], 7.0, [0, 1]),  # the third needs those before it to have had their turn
        ([0.0, 0.0, 5.0], 8.0, [0, 1]),
        ([5.0, 0.0, 2.0], 8.0, [1]),  # longest wait first, not first come
        ([0.0] * 16, 0.9, []),
        ([0.0] * 16, 1.0, [0, 1]),
    ],
)
def test_turns_are_due_just_early_enough(since: list[float], now: float, due: list[int]) -> None:
    assert line(*since).due(now) == due


def test_without_a_wait_limit_no_flow_is_due() -> None:
    assert line(0.0, 0.0, 0.0, bound=WaitBound(0.0, 2, 4)).due(1e9) == []


def test_an_item_that_needs_several_turns_delays_those_after_it_for_as_long() -> None:
    waiting = line(0.0)
    waiting.put(1, 0.5, num_turns=5)
    waiting.put(2, 1.0)
    waiting.check_integrity()
    assert waiting.num_turns == 7
    assert waiting.due(5.9) == []
    assert waiting.due(6.0) == [0, 1], "the seventh turn is the fourth round"
    waiting.put(1, 0.5, num_turns=1)
    assert waiting.num_turns == 3 and waiting.due(7.9) == [] and waiting.due(8.0) == [0, 1]


def test_an_item_moves_when_it_waits_since_another_time() -> None:
    waiting = line(3.0, 1.0)
    waiting.put(0, 0.0)
    assert waiting.since(0) == 0.0 and len(waiting) == 2
    assert waiting.due(100.0) == [0, 1]
    waiting.discard(0)
    waiting.discard(0)
    assert 0 not in waiting and waiting.num_turns == 1
    waiting.check_integrity()


@pytest.mark.parametrize(("max_wait_s", "turn_s"), [(0.0, 1.0), (1.0, 0.125), (4.0, 0.5), (8.0, 1.0), (600.0, 1.0)])
def test_a_turn_is_a_second_or_an_eighth_of_the_wait_limit(max_wait_s: float, turn_s: float) -> None:
    assert WaitBound(max_wait_s, 1, 1).turn_s == turn_s


def test_the_wait_limit_can_be_kept_for_as_many_as_have_a_turn_in_time() -> None:
    assert (BOUND.num_adapter_places, BOUND.max_flows(), BOUND.num_flows_a_turn) == (2, 4 * 6, 2)
    assert BOUND.max_flows(num_kept=1) == 3 * 6
    assert SlotTurns(8, 1.0, 1.0).max_turns(60.0) == 448
    assert SlotTurns(8, 4.0, 4.0).max_turns(60.0) == 8 * 11
    assert SlotTurns(8, 40.0, 40.0).max_turns(60.0) == 16, "one in each slot and one that waits for it"
    assert SlotTurns(1, 1.5, 1.0).max_turns(60.0) == 36
    assert SlotTurns(1, 40.0, 1.0).max_turns(60.0) == 1, "the slot is taken at times only"
    assert WaitBound(60.0, 8, 64).places_left(num_pinned=3) == 5
    assert WaitBound(10.0, 8, 1).num_adapter_places == 1, "one seat is one place, however many slots there are"
    assert [BOUND.num_turns(num) for num in range(5)] == [0, 1, 1, 2, 2]


def test_adapters_beyond_what_the_wait_limit_allows_are_refused_by_number_and_flag() -> None:
    admission = AdmissionControl(BOUND)
    for number in range(14):
        admission.num_served_turns = min(number, 2)
        admission.enter("", f"a{number}")
    assert admission.num_waiting_turns == 12
    with pytest.raises(
        QueueFullError, match=r"^12 adapters wait for 2 slots .*-wait-s 10 can be kept for 12\..*--max-loras"
    ):
        admission.enter("", "new")
    admission.enter("", "a0")  # runs
    admission.enter("other", "a9")  # is served in the same turn
    admission.enter("", None)  # needs no slot
    with pytest.raises(QueueFullError):
        admission.enter("third", "a9")
    admission.leave("", "a13")
    admission.enter("third", "a9")


def test_flows_beyond_what_the_wait_limit_allows_are_refused() -> None:
    admission = AdmissionControl(BOUND)
    for number in range(24):
        admission.enter(f"t{number}", None)
    with pytest.raises(QueueFullError, match=r"24 flows .* 4 seats.*--max-num-seqs"):
        admission.enter("new", None)
    admission.enter("t3", None)
    admission.num_served_flows = 1
    admission.enter("new", None)


def test_adapters_flows_leave_the_base_models_part_of_the_seats() -> None:
    admission = AdmissionControl(WaitBound(max_wait_s=10.0, num_slots=8, num_seats=16))
    admission.num_base_seats = 4
    for number in range(12 * 6):
        admission.enter(f"t{number}", f"a{number % 40}")
    with pytest.raises(QueueFullError, match=r"72 flows .* 12 seats; .* can be kept for 72\."):
        admission.enter("new", "a0")
    for number in range(4 * 6):
        admission.enter(f"b{number}", None)
    with pytest.raises(QueueFullError, match=r"96 flows .* 16 seats"):
        admission.enter("new", None)
    admission.num_base_seats = 0
    admission.leave("b0", None)
    with pytest.raises(QueueFullError, match=r"14 seats; .* can be kept for 84"):
        admission.enter("new", "a0")


def test_one_tenants_many_adapters_leave_room_for_anothers_first() -> None:
    admission = AdmissionControl(WaitBound(max_wait_s=10.0, num_slots=8, num_seats=16))
    for number in range(42):
        admission.enter("many", f"weight {number}")
    with pytest.raises(QueueFullError, match="can be kept for 42"):
        admission.enter("many", "one more")
    admission.enter("many", "weight 0")  # waits anyhow
    for number in range(6):
        admission.enter("few", f"adapter {number}")
    with pytest.raises(QueueFullError):
        admission.enter("few", "one more")
    for number in range(42):
        admission.leave("many", f"weight {number}")
    for number in range(6):
        admission.leave("few", f"adapter {number}")
    admission.leave("many", "weight 0")
    assert not admission._turns_of


def test_without_a_wait_limit_none_is_refused_and_nothing_is_kept_of_those_that_left() -> None:
    admission = AdmissionControl(WaitBound(0.0, 1, 1))
    for number in range(1000):
        admission.enter("t", f"a{number}")
    assert admission.num_waiting_turns == admission.num_waiting_flows == 1000
    for number in range(1000):
        admission.leave("t", f"a{number}")
    assert not admission._flows and not admission._requests and not admission.num_waiting_turns


def test_an_item_that_needs_several_places_at_once_has_them_in_one_turn() -> None:
    bound = WaitBound(max_wait_s=10.0, num_slots=4, num_seats=8)
    waiting: Line[str] = Line(4, bound)
    for since, (item, width) in enumerate([("one", 1), ("three", 3), ("two", 2), ("four", 4), ("last", 1)]):
        waiting.put(item, since / 100, bound.num_turns(1, width), width)
    waiting.check_integrity()
    # Turns of a second: one and three; two, with two places left empty; four; last.
    assert waiting.num_turns == 1 + 5 + 3 + 7 + 1
    assert waiting.due(5.03) == []
    assert waiting.due(5.04) == ["one", "three"]
    waiting.discard("one")
    waiting.check_integrity()
    assert waiting.due(5.04) == ["three"], "two has no room beside it"
    waiting.discard("three")
    assert waiting.due(6.04) == ["two"]


def test_a_composition_counts_for_what_may_be_left_empty_before_it() -> None:
    assert [BOUND.num_turns(flows, 3) for flows in range(4)] == [0, 5, 5, 10]
    admission = AdmissionControl(BOUND)
    admission.enter("t", "a+b", 2)
    admission.enter("t", "a+b", 2)
    admission.enter("u", "a", 1)
    assert admission.num_waiting_turns == 4
    for number in range(3):
        admission.enter("t", f"c{number}+d", 2)
    with pytest.raises(QueueFullError):
        admission.enter("t", "e+f", 2)
    for _ in range(2):
        admission.leave("t", "a+b", 2)
    assert admission.num_waiting_turns == 10


def test_a_slots_turn_is_as_long_as_slots_take_to_change_hands() -> None:
    pace = SlotPace(WaitBound(60.0, 8, 64))
    assert pace.turns(8) == SlotTurns(8, 1.0, 1.0) and pace.empty_share == 0.0
    for _ in range(40):
        pace.book(empty_s=0.1, ready_s=0.0)
    assert pace.turns(8).turn_s == 1.0, "a seat's turn is enough"
    assert pace.empty_share == pytest.approx(0.1, rel=0.01)
    for _ in range(40):
        pace.book(empty_s=2.0)
    assert pace.turns(8).turn_s == pytest.approx(COST * 2.0, rel=0.01), "a fifth of it stands empty"
    for _ in range(40):
        pace.book(empty_s=0.0, ready_s=0.5)
    assert pace.turns(8).turn_s == pytest.approx(8.0, rel=0.01), "two adapters a second come into eight slots"


@pytest.mark.parametrize(
    ("num_places", "turns"),
    [(8.0, (8, 1.0)), (3.7, (3, 1.0)), (1.0, (1, 1.0)), (0.5, (1, 2.0)), (0.1, (1, 10.0))],
)
def test_turns_that_may_be_taken_part_of_the_time_in_one_slot_are_longer(
    num_places: float, turns: tuple[int, float]
) -> None:
    assert SlotPace(WaitBound(60.0, 8, 64)).turns(num_places) == SlotTurns(*turns, hold_s=1.0)


def test_slow_loads_let_fewer_adapters_wait_and_those_in_slots_come_in() -> None:
    admission = AdmissionControl(BOUND)
    admission.slot_turns = SlotTurns(2, 5.0, 5.0)
    for number in range(4):
        admission.enter("t", f"a{number}")
    with pytest.raises(QueueFullError, match="4 adapters wait"):
        admission.enter("t", "new")
    admission.enter("t", "hot", is_hot=True)
    admission.enter("t", None)


def test_items_that_could_not_have_a_place_now_are_passed() -> None:
    waiting = line(0.0, 0.0, 0.0, 0.0)
    assert waiting.due(8.0) == [0, 1]
    assert waiting.due(8.0, lambda item: item % 2 == 1) == [1, 3]
    assert waiting.due(8.0, lambda item: False) == []
    assert list(waiting.longest(0.0)) == [0, 1, 2, 3] and list(waiting.longest(-1.0)) == []
    assert waiting.first_since == 0.0 and line().first_since == float("inf")


def test_once_all_requests_have_ended_as_many_adapters_may_wait_as_at_first() -> None:
    bound = WaitBound(10.0, 4, 8)
    admission = AdmissionControl(bound)
    at_first = admission.slot_turns
    admission.enter("t", "a")
    admission.slot_turns = SlotTurns(1, 8.0, 1.0)  # as measured under load
    admission.leave("t", "a")
    assert admission.slot_turns == at_first
