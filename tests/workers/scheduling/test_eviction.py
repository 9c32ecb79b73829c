"""The adapter evicted first: the least recently used, or the cheapest to load again."""

from __future__ import annotations

import random

import pytest

from lorafleet.workers.scheduling.eviction import EVICTIONS, Eviction, GreedyDualSizeFrequency, make_eviction

MB = 1 << 20


def use(eviction: Eviction, *digests: str, num_bytes: int = MB, reload_s: float = 0.01) -> None:
    for digest in digests:
        eviction.use(digest, num_bytes=num_bytes, reload_s=reload_s)


def test_lru_keeps_the_order_that_it_is_given() -> None:
    eviction = make_eviction("lru")
    use(eviction, "a", "a", "b")
    assert eviction.order(["b", "a"]) == ["b", "a"]


def test_what_is_often_used_small_or_slow_to_get_stays() -> None:
    eviction = make_eviction("cost")
    use(eviction, "often", "often", "often", "once")
    use(eviction, "small", num_bytes=MB // 2)
    use(eviction, "slow", reload_s=0.05)
    assert eviction.order(["slow", "small", "often", "once"]) == ["once", "small", "often", "slow"]


def test_between_equals_the_least_recently_used_goes() -> None:
    eviction = make_eviction("cost")
    use(eviction, "a", "b")
    assert eviction.order(["b", "a"]) == ["b", "a"]


def test_what_was_popular_once_is_overtaken() -> None:
    eviction = make_eviction("cost")
    use(eviction, *["star"] * 10)
    for number in range(30):
        use(eviction, f"new-{number}")
        victim = eviction.order(["star", f"new-{number}"])[0]
        eviction.evict(victim)
        if victim == "star":
            assert 5 <= number <= 15
            return
    pytest.fail("it stayed for ever")


def test_one_that_left_starts_anew() -> None:
    eviction = make_eviction("cost")
    use(eviction, *["star"] * 10)
    eviction.drop("star")
    use(eviction, "other", "other", "star")
    assert eviction.order(["star", "other"]) == ["star", "other"]


def test_nothing_is_remembered_of_what_is_gone() -> None:
    eviction = GreedyDualSizeFrequency()
    for number in range(1000):
        use(eviction, f"{number}")
        (eviction.evict if number % 2 else eviction.drop)(f"{number}")
    assert not eviction._uses and not eviction._priority


def misses(name: str, trace: list[str], room: int, sizes: dict[str, int]) -> float:
    """Return the seconds of loading over a trace, in a cache of `room` bytes; a load takes time by its size."""
    eviction, held, seconds = make_eviction(name), dict[str, None](), 0.0
    for digest in trace:
        reload_s = 0.005 + sizes[digest] / (500 * MB)
        if digest in held:
            del held[digest]
        else:
            seconds += reload_s
            for victim in eviction.order(held):
                if sum(sizes[other] for other in held) + sizes[digest] <= room:
                    break
                del held[victim]
                eviction.evict(victim)
        held[digest] = None
        eviction.use(digest, num_bytes=sizes[digest], reload_s=reload_s)
    return seconds


def test_on_a_skewed_trace_with_scans_cost_loads_less_than_lru() -> None:
    """Popular small adapters, and now and then a scan over large ones that are not requested again soon."""
    rng = random.Random(0)
    sizes = {f"small-{i}": MB for i in range(50)} | {f"large-{i}": 8 * MB for i in range(20)}
    names = list(sizes)[:50]
    trace: list[str] = []
    for sweep in range(40):
        trace += rng.choices(names, [1 / (i + 1) for i in range(50)], k=200)
        trace += [f"large-{(sweep + i) % 20}" for i in range(4)]
    lru, cost = (misses(name, trace, 32 * MB, sizes) for name in EVICTIONS)
    assert cost < 0.8 * lru
