"""Shares of places among several holders."""

from __future__ import annotations

import random

import pytest

from lorafleet.workers.scheduling.shares import CLAIM_S, Shares


class Clock:
    """Stands still until it is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


# Steps: a holder, how many places it asks for (below 0: gives back), whether it gets them. 64 places, 8 kept back.
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([("a", 56, True), ("a", 1, False)], id="one alone has all but what is kept back"),
        pytest.param([("", 64, True), ("", 1, False)], id="where there are no names nothing is kept back"),
        pytest.param([("a", 65, False), ("a", 57, False), ("a", 56, True)], id="more than there is"),
        pytest.param([("a", 56, True), ("b", 8, True), ("b", 1, False)], id="a newcomer finds an eighth"),
        pytest.param(
            [("a", 56, True), ("b", 28, False), ("a", -20, True), ("a", 1, False), ("b", 28, True)],
            id="a returned place goes to a holder that was refused below its share",
        ),
        pytest.param(
            [("a", 40, True), ("b", 10, True), ("a", 6, True), ("a", 1, False), ("b", 8, True)],
            id="beyond a share only what is not kept back",
        ),
        pytest.param(
            [("a", 56, True), ("b", 50, False), ("a", -10, True), ("a", 10, True)],
            id="a holder over its share holds up no other",
        ),
        pytest.param(
            [("a", 28, True), ("b", 28, True), ("c", 8, True), ("c", 1, False), ("b", -1, True), ("b", 1, False)],
            id="three share by thirds",
        ),
        pytest.param([("a", 1, True), ("a", -1, True), ("b", 56, True)], id="who has given all back does not count"),
    ],
)
def test_places_are_given_by_the_rule(steps: list[tuple[str, int, bool]], clock: Clock) -> None:
    shares = Shares(64, clock)
    for number, (holder, num_places, is_given) in enumerate(steps):
        if num_places < 0:
            shares.give_back(holder, -num_places)
        else:
            assert (shares.take(holder, num_places) is None) == is_given, number
        shares.check_integrity()


def test_a_refusal_counts_for_a_while(clock: Clock) -> None:
    shares = Shares(64, clock)
    assert shares.take("a", 56) is None
    refusal = shares.take("b", 20)
    assert refusal is not None
    assert (refusal.limit, refusal.num_taken, refusal.num_held) == (64, 56, 0)
    assert (refusal.share, refusal.num_holders) == (28, 2)
    shares.give_back("a", 16)
    assert shares.take("a", 1) is not None  # 16 are free, and b wants them
    clock.now += CLAIM_S
    assert shares.take("a", 16) is None  # b did not come again
    shares.check_integrity()


def test_a_limit_of_one_place_is_a_place(clock: Clock) -> None:
    shares = Shares(1, clock)
    assert shares.take("a") is None
    assert shares.take("b") is not None
    shares.give_back("a")
    assert shares.take("b") is None  # whoever comes first
    assert shares.take("a") is not None


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_a_holder_that_asks_again_gets_its_share(seed: int, clock: Clock) -> None:
    """One takes all it can, others come and go: one that holds nothing is served in the end."""
    draw = random.Random(seed)
    shares = Shares(48, clock)
    held = dict.fromkeys("abcd", 0)
    for _ in range(300):
        holder = draw.choice("aaaabcd")
        num_places = draw.randint(1, 20)
        if draw.random() < 0.4:
            given_back = min(held[holder], num_places)
            if given_back:
                shares.give_back(holder, given_back)
                held[holder] -= given_back
        elif shares.take(holder, num_places) is None:
            held[holder] += num_places
        shares.check_integrity()
        assert {name: shares.held(name) for name in held} == held
        clock.now += draw.random()
    for _ in range(48):  # everybody's work ends bit by bit; all ask for more at once, the newcomer last
        refusals = [shares.take(holder) for holder in "abcd"]
        for holder, refusal in zip("abcd", refusals, strict=True):
            held[holder] += refusal is None
        if shares.take("new", 8) is None:
            return
        for holder in "abcd":
            if held[holder]:
                shares.give_back(holder)
                held[holder] -= 1
    pytest.fail("the newcomer was never served")
