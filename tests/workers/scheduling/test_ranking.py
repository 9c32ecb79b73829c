"""The heap whose keys may grow while they are in it, compared with sorting."""

from __future__ import annotations

import random

import pytest

from lorafleet.workers.scheduling.ranking import Ranking


@pytest.mark.parametrize("seed", range(20))
def test_the_order_is_that_of_the_keys_whatever_grows_comes_or_goes(seed: int) -> None:
    rng = random.Random(seed)
    keys: dict[str, tuple[int, str]] = {}
    ranking: Ranking[str] = Ranking(keys.__getitem__)
    for number in range(600):
        action = rng.random()
        if action < 0.4 or not keys:
            name = f"i{number}"
            keys[name] = (rng.randrange(100), name)
            ranking.push(name)
        elif action < 0.7:
            name = rng.choice(sorted(keys))
            keys[name] = (keys[name][0] + rng.randrange(50), name)  # grows without a word
        elif action < 0.8:
            name = rng.choice(sorted(keys))
            keys[name] = (keys[name][0] - rng.randrange(50), name)
            ranking.push(name)
        else:
            name = rng.choice(sorted(keys))
            ranking.discard(name)
            del keys[name]
        in_order = sorted(keys, key=keys.__getitem__)
        assert ranking.first() == (in_order[0] if in_order else None)
        num = rng.randrange(8)
        assert ranking.take(num) == in_order[:num]
        assert set(ranking) == keys.keys() and len(ranking) == len(keys)
        ranking.check_integrity()


def test_equals_are_in_the_order_of_their_coming() -> None:
    ranking: Ranking[str] = Ranking(lambda item: 0)
    for item in "cab":
        ranking.push(item)
    ranking.push("c")
    assert ranking.take(3) == ["c", "a", "b"]


def test_what_comes_and_goes_behind_a_standing_first_leaves_no_trace() -> None:
    ranking: Ranking[int] = Ranking(lambda item: item)
    ranking.push(0)
    for item in range(1, 10_000):
        ranking.push(item)
        ranking.discard(item)
    assert ranking.first() == 0
    assert len(ranking._heap) < 100
