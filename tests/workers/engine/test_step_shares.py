"""A step's tokens between tenants, as tables."""

from __future__ import annotations

import pytest

from lorafleet.workers.engine.step_shares import NEWCOMERS, StepShares, Wanted, share_out


def rows(num_rows: int, weight: float = 1.0) -> Wanted:
    return Wanted(weight, num_rows=num_rows)


def prompt(num_tokens: int, weight: float = 1.0) -> Wanted:
    return Wanted(weight, num_prompt_tokens=num_tokens)


@pytest.mark.parametrize(
    ("num_tokens", "wanted", "shares"),
    [
        (24, {"a": rows(1), "b": rows(50)}, {"a": 1, "b": 23}),
        (24, {"a": prompt(900), "b": prompt(900)}, {"a": 12, "b": 12}),
        (24, {"a": prompt(900, weight=3.0), "b": prompt(900)}, {"a": 18, "b": 6}),
        (24, {"a": rows(1), "b": prompt(900), NEWCOMERS: prompt(5)}, {"a": 1, NEWCOMERS: 5, "b": 18}),
        (64, {"a": rows(1), "b": rows(2)}, {"a": 1, "b": 2}),
        (2, {"a": rows(1), "b": rows(1), "c": rows(9)}, {"a": 1, "b": 1, "c": 1}),
        (9, {}, {}),
    ],
)
def test_shares(num_tokens: int, wanted: dict[str | None, Wanted], shares: dict[str | None, int]) -> None:
    assert share_out(num_tokens, wanted) == shares


def test_a_tenants_streams_leave_some_of_its_share_to_its_prompts() -> None:
    shares = StepShares(40, {"a": Wanted(num_rows=50, num_prompt_tokens=100), "b": rows(50)})
    assert (shares.room_for_rows("a"), shares.room("a")) == (15, 20)
    assert shares.room_for_rows("b") == 20


def test_what_is_taken_is_gone_and_what_is_given_back_is_there() -> None:
    shares = StepShares(10, {"a": rows(20), "b": rows(20)})
    shares.take("a", 5)
    assert (shares.room("a"), shares.room("b"), shares.num_left) == (0, 5, 5)
    shares.take("a", -1)
    assert (shares.room("a"), shares.num_left) == (1, 6)


def test_nobody_has_more_than_is_left_in_all() -> None:
    shares = StepShares(1, {"a": rows(1), "b": rows(1)})
    shares.take("a", 1)
    assert shares.room("b") == 0


def test_in_the_end_it_is_for_whoever_comes_first() -> None:
    shares = StepShares(10, {"a": rows(2), "b": rows(2)})
    assert shares.are_shared and shares.room("a") == 2 and shares.room("unknown") == 0
    shares.open()
    assert not shares.are_shared and shares.room("a") == shares.room_for_rows("a") == shares.room("unknown") == 10
