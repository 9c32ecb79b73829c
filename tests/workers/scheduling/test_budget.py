"""The cost of turns that preempt: saved up while nothing is lost, spent while seats stand empty."""

from __future__ import annotations

import pytest

from lorafleet.workers.scheduling.budget import SHARE, TurnBudget


def budget(*spans: tuple[float, int, int], redone: float = 0.0, cost: float = 0.0) -> TurnBudget:
    """Return a budget after some time. spans: (seconds, seats in use, seats that stand empty for a turn)."""
    made = TurnBudget(num_seats=64, turn_s=1.0)
    now = 0.0
    made.book(now, num_running=0, num_lost=0, redone=0.0, cost=0.0)
    for seconds, num_running, num_lost in spans:
        now += seconds
        made.book(now, num_running=num_running, num_lost=num_lost, redone=redone, cost=cost)
    return made


@pytest.mark.parametrize(
    ("spans", "num_more", "allowed"),
    [
        ([], 0, True),
        ([], 1, False),  # nothing is saved up yet
        ([], -1, True),
        ([(1.0, 40, 0)], 6, True),
        ([(1.0, 40, 0)], 7, False),
        ([(100.0, 64, 0)], 64, True),  # all seats for one turn, and no more
        ([(100.0, 64, 0)], 65, False),
        ([(1.0, 40, 0), (0.5, 30, 10)], 3, True),  # 6 - 0.5 * (10 - 6)
        ([(1.0, 40, 0), (0.5, 30, 10)], 5, False),
        ([(1.0, 40, 0), (0.5, 30, 10)], 0, True),
        ([(1.0, 40, 0), (2.0, 30, 10)], 0, False),
        ([(1.0, 40, 0), (2.0, 30, 10)], -1, True),  # it leaves fewer seats empty
    ],
)
def test_a_turn_is_taken_if_what_it_is_likely_to_cost_is_saved_up(
    spans: list[tuple[float, int, int]], num_more: int, allowed: bool
) -> None:
    assert budget(*spans).allows(0, num_more) == allowed


def test_seats_that_stand_empty_already_count_for_the_next_turn_too() -> None:
    saved = budget((1.0, 40, 0))
    assert saved.allows(0, 3) and saved.allows(3, 3) and not saved.allows(4, 3)


def test_what_is_computed_again_is_lost() -> None:
    assert budget((1.0, 40, 0), redone=SHARE / 2).allows(0, 3)
    assert not budget((1.0, 40, 0), redone=SHARE / 2).allows(0, 4)
    assert budget((1.0, 40, 0), redone=SHARE * 2).is_overdrawn


def test_turns_are_taken_in_as_many_slots_as_cost_no_more_than_the_share() -> None:
    assert budget((100.0, 64, 0)).places(8) == 8
    assert budget((100.0, 64, 0), cost=7.0).places(8) == pytest.approx(64 * SHARE / 7)
    assert budget((100.0, 57, 7), cost=7.0).places(8) == pytest.approx(64 * SHARE / 7), "those that are lost count"
    assert budget((100.0, 64, 0), cost=31.0).places(2) == pytest.approx(64 * SHARE / 31), "a third of the time"


def test_a_cost_counts_at_once_and_is_forgotten_slowly() -> None:
    known = budget((100.0, 64, 0))
    known.book(100.1, num_running=64, num_lost=0, redone=0.0, cost=7.0)
    assert known.places(8) == pytest.approx(64 * SHARE / 7)
    known.book(102.1, num_running=64, num_lost=0, redone=0.0, cost=0.0)
    assert known.places(8) == pytest.approx(64 * SHARE / 3.5)


def test_what_is_computed_again_after_turns_is_a_part_of_their_cost() -> None:
    known = budget((10.0, 64, 0), redone=0.1)
    for _ in range(50):
        known.take()
    assert known.places(8) == 8
    known = budget((10.0, 64, 0), redone=0.1)
    known.take()
    assert known.places(8) == pytest.approx(64 * SHARE / (64 / 4)), "of 64 seats times seconds a quarter counts yet"


def test_an_engine_that_was_idle_takes_turns_in_all_slots_again() -> None:
    budget = TurnBudget(num_seats=32, turn_s=1.0)
    for second in range(10):
        budget.book(float(second), num_running=32, num_lost=0, redone=0.0, cost=8.0)
    assert budget.places(8) < 1
    budget.book(10.0, num_running=0, num_lost=0, redone=0.0, cost=0.0)
    assert budget.places(8) == 8
