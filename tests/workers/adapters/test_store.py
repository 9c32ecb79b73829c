"""The host cache: bounded, least recently used first, one load for all callers, and never stuck.

A prefetch has no future to wait for: `prefetched` waits for all prefetches, `Disk.hold` for the start of a read.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.workers.adapters import store as adapter_store
from lorafleet.workers.adapters.config import AdapterConfig
from lorafleet.workers.adapters.format import AdapterSpec, HostAdapter
from lorafleet.workers.adapters.modules import BaseShapes
from lorafleet.workers.adapters.store import AdapterStore
from lorafleet.workers.errors import AdapterRefusedError, AdapterUnavailableError, InternalError
from lorafleet.workers.scheduling.eviction import make_eviction

TIMEOUT_S = 20.0
BASE = BaseShapes(num_layers=1, linears={})


def spec(digest: str, num_bytes: int = 10) -> AdapterSpec:
    # Two bytes an element: the stores below are of bfloat16.
    return AdapterSpec(
        digest=digest,
        path=Path("/adapters") / digest,
        config=AdapterConfig(base_model_name=None, lora_rank=1, lora_alpha=1.0, use_rslora=False),
        lora_rank=1,
        num_elements=num_bytes // 2,
    )


class Disk:
    """A loader that counts and can be blocked or broken."""

    def __init__(self) -> None:
        self.loads: Counter[str] = Counter()
        self.broken: dict[str, Exception] = {}
        self.open = threading.Event()
        self.open.set()
        self._lock = threading.Lock()
        self._held: dict[str, tuple[threading.Event, threading.Event]] = {}  # name → (its read began, it may end)

    def hold(self, name: str) -> tuple[threading.Event, threading.Event]:
        """Block reads of one adapter half way: (set when one has begun, set to let it continue)."""
        self._held[name] = threading.Event(), threading.Event()
        return self._held[name]

    def release_all(self) -> None:
        self.open.set()
        for _, may_end in self._held.values():
            may_end.set()

    def load(self, wanted: AdapterSpec, base: BaseShapes, dtype: torch.dtype) -> HostAdapter:
        with self._lock:
            self.loads[wanted.digest] += 1
        assert self.open.wait(TIMEOUT_S)
        if wanted.digest in self._held:
            began, may_end = self._held[wanted.digest]
            began.set()
            assert may_end.wait(TIMEOUT_S)
        if wanted.digest in self.broken:
            raise self.broken[wanted.digest]
        return HostAdapter(digest=wanted.digest, weights={}, num_bytes=wanted.num_elements * dtype.itemsize)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def clock() -> Clock:
    return Clock()


MakeStore = Callable[..., AdapterStore]


@pytest.fixture
def make_store(disk: Disk, clock: Clock) -> Iterator[MakeStore]:
    stores: list[AdapterStore] = []

    def make(
        *,
        names: str = "abcd",
        max_bytes: int = 1000,
        max_adapters: int | None = None,
        eviction: str = "lru",
        **options: Any,
    ) -> AdapterStore:
        store = AdapterStore(
            BASE,
            max_bytes=max_bytes,
            max_adapters=max_adapters,
            dtype=torch.bfloat16,
            eviction=make_eviction(eviction),
            load=disk.load,
            clock=clock,
            **options,
        )
        stores.append(store)
        for name in names:
            store.register(spec(name))
        return store

    yield make
    disk.release_all()
    for store in stores:
        store.close()
        store.check_integrity()


def take(store: AdapterStore, digest: str) -> HostAdapter:
    adapter = store.fetch(digest).result(TIMEOUT_S)
    store.check_integrity()
    return adapter


def use(store: AdapterStore, digest: str) -> None:
    """Fetch and release."""
    assert take(store, digest).digest == digest
    store.release(digest)
    store.check_integrity()


def prefetched(store: AdapterStore, names: str = "") -> None:
    """Prefetch these, and wait until they and all earlier prefetches are done."""
    for name in names:
        store.prefetch(name)
        store.check_integrity()
    assert store._prefetcher.wait(TIMEOUT_S)
    store.check_integrity()


def error_of(future: Future[HostAdapter]) -> BaseException | None:
    return future.exception(TIMEOUT_S)


def test_the_least_recently_used_is_evicted_first(make_store: MakeStore, disk: Disk) -> None:
    store = make_store(max_adapters=3)
    for name in "abca":
        use(store, name)
    assert store.resident() == ("b", "c", "a")
    use(store, "d")
    assert store.resident() == ("c", "a", "d")
    use(store, "b")
    assert store.resident() == ("a", "d", "b")
    assert disk.loads == Counter({"b": 2, "a": 1, "c": 1, "d": 1})


def test_the_count_is_bounded(make_store: MakeStore) -> None:
    store = make_store(max_adapters=2)
    for name in "abcd":
        use(store, name)
    stats = store.stats()
    assert (stats.num_cached, stats.num_registered, stats.loads, stats.evictions) == (2, 4, 4, 2)


def test_the_bytes_are_bounded_and_as_many_are_evicted_as_needed(make_store: MakeStore) -> None:
    store = make_store(names="", max_bytes=100)
    for name, num_bytes in (("a", 40), ("b", 30), ("c", 30), ("large", 60), ("whole", 100)):
        store.register(spec(name, num_bytes))
    for name in "abc":
        use(store, name)
    assert store.stats().bytes == 100
    use(store, "large")
    assert store.resident() == ("c", "large")
    assert store.stats().bytes == 90
    use(store, "whole")
    assert store.resident() == ("whole",)


def test_the_usage_is_that_of_the_nearer_bound(make_store: MakeStore) -> None:
    assert make_store(names="", max_bytes=0).stats().usage == 0.0, "without LoRA"
    for bounds, usage in (({"max_bytes": 40}, 0.5), ({"max_bytes": 40, "max_adapters": 2}, 1.0)):
        store = make_store(**bounds)
        for name in "ab":
            use(store, name)
        assert store.stats().usage == usage


def test_an_adapter_larger_than_the_cache_is_refused_at_registration(make_store: MakeStore) -> None:
    store = make_store(max_bytes=100)
    with pytest.raises(
        AdapterRefusedError, match=r"/adapters/big takes 102 bytes.*holds 100.*--lora-host-cache-bytes"
    ) as info:
        store.register(spec("big", 102))
    assert info.value.reason == "larger_than_host_cache"
    assert store.stats().num_registered == 4


def test_by_cost_what_was_slow_to_read_and_often_used_stays(make_store: MakeStore, disk: Disk, clock: Clock) -> None:
    def read(wanted: AdapterSpec, base: BaseShapes, dtype: torch.dtype) -> HostAdapter:
        clock.now_s += 5.0 if wanted.digest == "a" else 1.0
        return disk.load(wanted, base, dtype)

    store = make_store(max_adapters=3, eviction="cost")
    store._load = read
    for name in "aabbbbbc":
        use(store, name)
    use(store, "d")
    assert store.resident() == ("a", "b", "d"), "c was read as quickly as b and used less often"


def test_what_is_held_is_never_evicted(make_store: MakeStore, disk: Disk) -> None:
    store = make_store(max_adapters=2)
    held = take(store, "a")
    for name in "bcdbcd":
        use(store, name)
        assert "a" in store.resident()
    assert take(store, "a") is held
    assert disk.loads["a"] == 1


def test_a_fetch_without_room_waits_and_is_served_after_a_release(make_store: MakeStore, disk: Disk) -> None:
    store = make_store(max_adapters=2)
    take(store, "a")
    take(store, "a")
    take(store, "b")
    waiting = store.fetch("c")
    store.check_integrity()
    store.release("a")  # one of two holders
    store.check_integrity()
    assert not waiting.done()
    assert disk.loads["c"] == 0
    store.release("a")
    assert waiting.result(TIMEOUT_S).digest == "c"
    assert store.resident() == ("b", "c")


def test_waiting_fetches_are_served_oldest_first(make_store: MakeStore) -> None:
    store = make_store(names="", max_bytes=100)
    for name, num_bytes in (("held", 60), ("other", 40), ("large", 80), ("small", 10)):
        store.register(spec(name, num_bytes))
    take(store, "held")
    take(store, "other")
    large, small = store.fetch("large"), store.fetch("small")
    store.release("other")  # enough for the small one, which came later
    assert not large.done()
    assert not small.done()
    store.release("held")
    assert large.result(TIMEOUT_S).digest == "large"
    assert small.result(TIMEOUT_S).digest == "small"


def test_a_failed_load_gives_its_room_to_the_next_in_line(make_store: MakeStore, disk: Disk) -> None:
    store = make_store(max_adapters=1)
    disk.broken["a"] = AdapterUnavailableError("gone")
    disk.open.clear()
    failing, waiting = store.fetch("a"), store.fetch("b")
    disk.open.set()
    assert error_of(failing) is disk.broken["a"]
    assert waiting.result(TIMEOUT_S).digest == "b"


def test_a_crowd_shares_one_load(make_store: MakeStore, disk: Disk) -> None:
    store = make_store(max_adapters=1)
    disk.open.clear()
    start = threading.Barrier(5)
    futures: list[Future[HostAdapter]] = []

    def crowd() -> None:
        start.wait(TIMEOUT_S)
        for _ in range(100):
            futures.append(store.fetch("a"))

    threads = [threading.Thread(target=crowd) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert store.resident() == ()
    disk.open.set()
    assert wait(futures, TIMEOUT_S).not_done == set()
    assert len(futures) == 500
    assert len({id(future.result()) for future in futures}) == 1
    assert disk.loads == Counter({"a": 1})
    assert (store.stats().hits, store.stats().loads) == (499, 1)
    waiting = store.fetch("b")
    for _ in range(499):
        store.release("a")
    assert not waiting.done(), "one still holds it"
    store.release("a")
    assert waiting.result(TIMEOUT_S).digest == "b"


def test_a_crowd_that_waits_for_room_shares_one_load_too(make_store: MakeStore, disk: Disk) -> None:
    store = make_store(max_adapters=1)
    take(store, "a")
    futures = [store.fetch("b") for _ in range(50)]
    store.release("a")
    assert len({id(future.result(TIMEOUT_S)) for future in futures}) == 1
    assert disk.loads["b"] == 1


def test_a_failure_is_remembered_for_a_while_that_doubles_up_to_a_bound(
    make_store: MakeStore, disk: Disk, clock: Clock
) -> None:
    store = make_store()
    error = disk.broken["a"] = AdapterUnavailableError("gone")
    for attempt, delay_s in enumerate([1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0], start=1):
        assert error_of(store.fetch("a")) is error
        assert disk.loads["a"] == attempt
        clock.now_s += delay_s - 0.01
        assert error_of(store.fetch("a")) is error
        assert disk.loads["a"] == attempt, "too early to look again"
        clock.now_s += 0.01
        store.check_integrity()
    assert store.stats().failures == 7
    del disk.broken["a"]
    use(store, "a")
    disk.broken["a"] = AdapterUnavailableError("gone again")
    small = make_store(max_adapters=1)
    assert error_of(small.fetch("a")) is disk.broken["a"]


def test_a_success_forgets_earlier_failures(make_store: MakeStore, disk: Disk, clock: Clock) -> None:
    store = make_store(max_adapters=1)
    disk.broken["a"] = AdapterUnavailableError("gone")
    for delay_s in (1.0, 2.0):
        assert error_of(store.fetch("a"))
        clock.now_s += delay_s
    error = disk.broken.pop("a")
    use(store, "a")
    use(store, "b")  # evicts it
    disk.broken["a"] = error
    assert error_of(store.fetch("a")) is error
    clock.now_s += 1.0
    del disk.broken["a"]
    use(store, "a")


def test_registering_again_takes_the_new_path_and_forgets_the_failure(make_store: MakeStore, disk: Disk) -> None:
    store = make_store()
    disk.broken["a"] = AdapterUnavailableError("gone")
    assert error_of(store.fetch("a")) is disk.broken["a"]
    del disk.broken["a"]
    store.register(spec("a"))
    use(store, "a")


def test_an_unexpected_error_of_the_loader_becomes_a_named_one(make_store: MakeStore, disk: Disk) -> None:
    store = make_store()
    disk.broken["a"] = ZeroDivisionError("surprise")
    error = error_of(store.fetch("a"))
    assert isinstance(error, InternalError)
    assert "surprise" not in error.message  # it may hold a path; the log has it


def test_one_adapters_failure_leaves_the_others_alone(make_store: MakeStore, disk: Disk) -> None:
    store = make_store(max_adapters=2)
    disk.broken["a"] = AdapterUnavailableError("gone")
    take(store, "b")
    assert error_of(store.fetch("a"))
    assert store.resident() == ("b",)
    assert store.stats().bytes == 10


def test_close_fails_the_fetches_that_wait_for_room_and_ends_the_readers(make_store: MakeStore) -> None:
    store = make_store(max_adapters=1)
    take(store, "a")
    waiting = [store.fetch(name) for name in "bcd"]
    closer = threading.Thread(target=store.close, daemon=True)
    closer.start()
    closer.join(TIMEOUT_S)
    assert not closer.is_alive()
    for future in waiting:
        assert isinstance(error_of(future), InternalError)
    store.release("a")
    store.close()


def test_close_lets_running_reads_end(make_store: MakeStore, disk: Disk) -> None:
    store = make_store()
    disk.open.clear()
    running = store.fetch("a")
    closer = threading.Thread(target=store.close, daemon=True)
    closer.start()
    assert closer.is_alive()
    disk.open.set()
    closer.join(TIMEOUT_S)
    assert running.result(0).digest == "a"


def test_a_fetch_after_close_fails_and_holds_nothing(make_store: MakeStore) -> None:
    store = make_store()
    store.close()
    assert isinstance(error_of(store.fetch("a")), InternalError)
    assert store.stats().num_cached == 0


def test_what_was_prefetched_is_fetched_without_another_look_at_the_disk(make_store: MakeStore, disk: Disk) -> None:
    store = make_store()
    prefetched(store, "ab")
    assert store.resident() == ("a", "b")
    assert store.fetch("a").done()
    assert (store.stats().hits, store.stats().loads) == (1, 2)
    assert disk.loads == Counter("ab")


def test_what_is_cached_or_on_its_way_is_not_loaded_again(make_store: MakeStore, disk: Disk) -> None:
    store = make_store(max_adapters=2)
    use(store, "a")
    began, may_end = disk.hold("b")
    loading = store.fetch("b")
    assert began.wait(TIMEOUT_S)
    take(store, "a")
    waiting = store.fetch("c")
    prefetched(store, "abcabc")
    may_end.set()
    assert loading.result(TIMEOUT_S).digest == "b"
    store.release("a")
    assert waiting.result(TIMEOUT_S).digest == "c"
    prefetched(store, "bc")
    assert disk.loads == Counter("abc")


def test_a_prefetch_asked_for_twice_is_one_load(make_store: MakeStore, disk: Disk) -> None:
    store = make_store()
    began, may_end = disk.hold("a")
    store.prefetch("a")
    assert began.wait(TIMEOUT_S)
    for name in "abba":
        store.prefetch(name)
    may_end.set()
    prefetched(store)
    assert disk.loads == Counter("ab")


def test_a_prefetch_holds_nothing(make_store: MakeStore) -> None:
    store = make_store(max_adapters=2)
    prefetched(store, "ab")
    use(store, "c")
    assert store.resident() == ("b", "c")
    use(store, "d")
    assert store.resident() == ("c", "d")


def test_a_prefetch_evicts_what_is_idle_and_nothing_that_is_held(make_store: MakeStore) -> None:
    store = make_store(max_adapters=2)
    take(store, "a")
    use(store, "b")
    prefetched(store, "c")
    assert store.resident() == ("a", "c")


def test_a_prefetch_without_room_does_nothing_then_or_later(make_store: MakeStore, disk: Disk) -> None:
    store = make_store(max_adapters=2)
    take(store, "a")
    take(store, "b")
    prefetched(store, "c")
    store.release("a")
    prefetched(store)
    assert store.resident() == ("a", "b")
    assert disk.loads == Counter("ab")


def test_a_prefetch_that_would_not_fit_evicts_nothing(make_store: MakeStore) -> None:
    store = make_store(names="", max_bytes=100)
    for name, num_bytes in (("h", 60), ("i", 40), ("l", 50)):
        store.register(spec(name, num_bytes))
    take(store, "h")
    use(store, "i")
    prefetched(store, "l")
    assert store.resident() == ("h", "i")
    assert store.stats().evictions == 0


def test_a_prefetch_does_not_undo_another(make_store: MakeStore) -> None:
    """The oldest is fetched first, so the younger ones are evicted."""
    store = make_store(max_adapters=2)
    prefetched(store, "abcd")
    assert store.resident() == ("a", "b")
    use(store, "a")
    prefetched(store, "c")
    assert store.resident() == ("b", "c")


def test_a_prefetch_keeps_what_is_cached_already_from_being_evicted_by_the_next(make_store: MakeStore) -> None:
    store = make_store(max_adapters=2)
    use(store, "a")
    use(store, "b")
    prefetched(store, "ac")
    assert store.resident() == ("a", "c")


def test_a_fetch_takes_the_room_of_a_prefetch_that_is_being_read(make_store: MakeStore, disk: Disk) -> None:
    store = make_store(max_adapters=1)
    began, may_end = disk.hold("a")
    store.prefetch("a")
    assert began.wait(TIMEOUT_S)
    assert take(store, "b").digest == "b"
    waiting = store.fetch("a")
    may_end.set()
    prefetched(store)
    assert store.resident() == ("b",), "the read came too late for its room"
    store.release("b")
    assert waiting.result(TIMEOUT_S).digest == "a"
    assert disk.loads == Counter("aab")


def test_a_prefetch_that_failed_after_its_room_was_taken_harms_nobody(make_store: MakeStore, disk: Disk) -> None:
    store = make_store(max_adapters=1)
    began, may_end = disk.hold("a")
    disk.broken["a"] = AdapterUnavailableError("gone")
    store.prefetch("a")
    assert began.wait(TIMEOUT_S)
    take(store, "b")
    may_end.set()
    prefetched(store)
    assert store.resident() == ("b",)
    assert (store.stats().bytes, store.stats().failures) == (10, 1)


def test_a_fetch_does_not_wait_behind_prefetches(make_store: MakeStore, disk: Disk) -> None:
    store = make_store()
    began, may_end = disk.hold("a")
    for name in "abcd":
        store.prefetch(name)
    assert began.wait(TIMEOUT_S)
    assert take(store, "d").digest == "d", "though its prefetch has not even begun"
    may_end.set()
    prefetched(store)
    assert disk.loads == Counter("abcd")


def test_a_fetch_joins_a_prefetch_that_is_being_read_and_holds_it(make_store: MakeStore, disk: Disk) -> None:
    store = make_store(max_adapters=1)
    began, may_end = disk.hold("a")
    store.prefetch("a")
    assert began.wait(TIMEOUT_S)
    joined, other = store.fetch("a"), store.fetch("b")
    store.check_integrity()
    may_end.set()
    assert joined.result(TIMEOUT_S).digest == "a"
    assert not other.done()
    assert disk.loads == Counter("a")
    store.release("a")
    assert other.result(TIMEOUT_S).digest == "b"


def test_a_prefetch_gives_way_to_fetches_that_wait_for_room(make_store: MakeStore, disk: Disk) -> None:
    store = make_store(names="", max_bytes=100)
    for name, num_bytes in (("h", 60), ("l", 50), ("s", 10)):
        store.register(spec(name, num_bytes))
    take(store, "h")
    waiting = store.fetch("l")
    prefetched(store, "s")
    assert disk.loads == Counter("h")
    store.release("h")
    assert waiting.result(TIMEOUT_S).digest == "l"


def test_a_failed_prefetch_leaves_no_trace(make_store: MakeStore, disk: Disk) -> None:
    store = make_store()
    disk.broken["a"] = AdapterUnavailableError("gone")
    prefetched(store, "ab")
    assert store.resident() == ("b",)
    assert store.stats().bytes == 10
    del disk.broken["a"]
    use(store, "a")
    assert disk.loads == Counter("aab")


def test_a_prefetch_that_fails_tells_those_who_joined_it_and_is_remembered(make_store: MakeStore, disk: Disk) -> None:
    store = make_store()
    error = disk.broken["a"] = AdapterUnavailableError("gone")
    began, may_end = disk.hold("a")
    store.prefetch("a")
    assert began.wait(TIMEOUT_S)
    joined = store.fetch("a")
    may_end.set()
    assert error_of(joined) is error
    assert error_of(store.fetch("a")) is error
    prefetched(store, "a")
    assert disk.loads == Counter("a"), "too early to look again"


def test_prefetches_that_wait_for_their_thread_are_bounded(
    make_store: MakeStore, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_store, "_MAX_PREFETCHES", 2)
    store = make_store()
    began, may_end = disk.hold("a")
    store.prefetch("a")
    assert began.wait(TIMEOUT_S)
    for name in "bcd":
        store.prefetch(name)
        store.check_integrity()
    may_end.set()
    prefetched(store)
    assert store.resident() == ("a", "b", "c")


def test_close_ends_a_running_prefetch_and_drops_the_others(make_store: MakeStore, disk: Disk) -> None:
    store = make_store()
    began, may_end = disk.hold("a")
    for name in "ab":
        store.prefetch(name)
    assert began.wait(TIMEOUT_S)
    closer = threading.Thread(target=store.close, daemon=True)
    closer.start()
    while not store._closed:
        closer.join(0.01)
    assert closer.is_alive()
    may_end.set()
    closer.join(TIMEOUT_S)
    assert not closer.is_alive()
    store.prefetch("c")
    assert disk.loads == Counter("a")


@pytest.mark.parametrize("seed", range(4))
def test_the_books_agree_after_any_operations(make_store: MakeStore, disk: Disk, clock: Clock, seed: int) -> None:
    rng = random.Random(seed)
    store = make_store(names="", max_bytes=100, max_adapters=4)
    names = [f"adapter-{i}" for i in range(12)]
    for name in names:
        store.register(spec(name, 2 * rng.randint(1, 25)))
    pending: list[tuple[str, Future[HostAdapter]]] = []
    held: list[str] = []

    def settle() -> bool:
        """Move ended fetches out of `pending`, and held ones into `held`."""
        ended = {future for future in {future for _, future in pending} if future.done()}
        held.extend(name for name, future in pending if future in ended and future.exception() is None)
        pending[:] = [entry for entry in pending if entry[1] not in ended]
        return bool(ended)

    for _ in range(600):
        match rng.choice(["fetch", "fetch", "prefetch", "release", "release", "break", "mend", "wait"]):
            case "prefetch":
                store.prefetch(rng.choice(names))
            case "fetch" if len(pending) + len(held) < 30:
                name = rng.choice(names)
                pending.append((name, store.fetch(name)))
            case "release" if held:
                store.release(held.pop(rng.randrange(len(held))))
            case "break":
                disk.broken[rng.choice(names)] = AdapterUnavailableError("gone")
            case "mend" if disk.broken:
                disk.broken.pop(rng.choice(sorted(disk.broken)))
            case "wait":
                clock.now_s += rng.random()
        store.check_integrity()
        settle()
        assert set(held) <= set(store.resident()), "a held adapter was evicted"
    while pending or held:
        while held:
            store.release(held.pop())
            store.check_integrity()
        if pending:
            wait([future for _, future in pending], TIMEOUT_S, return_when="FIRST_COMPLETED")
            assert settle(), "a fetch waits though nobody holds anything"
    prefetched(store)
    assert store.stats().bytes <= 100


def test_what_is_forgotten_is_freed_and_can_be_registered_again(make_store: MakeStore, disk: Disk) -> None:
    store = make_store(max_bytes=100)
    use(store, "a")
    assert store.forget("a") == 10
    assert store.forget("b") == 0, "it was never loaded"
    assert store.stats().bytes == 0 and store.stats().num_registered == 2
    store.register(spec("a"))
    use(store, "a")
    assert disk.loads["a"] == 2


def test_what_is_forgotten_while_a_prefetch_reads_it_leaves_nothing_behind(make_store: MakeStore, disk: Disk) -> None:
    store = make_store(max_bytes=100)
    began, may_end = disk.hold("a")
    store.prefetch("a")
    assert began.wait(TIMEOUT_S)
    assert store.forget("a") == 10
    may_end.set()
    store.prefetch("b")  # on the same thread, so that the first read has ended when this one has
    prefetched(store)
    assert store.resident() == ("b",)
    store.check_integrity()


def test_content_that_was_seen_in_two_places_is_read_where_it_still_is(make_store: MakeStore, disk: Disk) -> None:
    store = make_store(max_bytes=100)
    copy = replace(spec("a"), path=Path("/copies/a"))
    store.register(copy)
    gone: set[Path] = {copy.path}

    def load(wanted: AdapterSpec, base: BaseShapes, dtype: torch.dtype) -> HostAdapter:
        if wanted.path in gone:
            raise AdapterUnavailableError(f"{wanted.path} changed.")
        return disk.load(wanted, base, dtype)

    store._load = load
    use(store, "a")
    store.forget("a")
    store.register(spec("a"))
    store.register(copy)
    gone.add(spec("a").path)
    error = error_of(store.fetch("a"))
    assert isinstance(error, AdapterUnavailableError) and "/adapters/a changed" in error.message


def test_what_is_in_use_goes_last_and_never_for_a_prefetch(make_store: MakeStore) -> None:
    store = make_store(max_adapters=2)
    needed = {"a"}
    store._need_of = needed.__contains__
    for name in "abc":
        use(store, name)
    assert store.resident() == ("a", "c")
    needed.add("c")
    prefetched(store, "d")
    assert store.resident() == ("a", "c")
    use(store, "d")
    assert store.resident() == ("c", "d")


def test_what_has_begun_goes_only_where_nobody_gives_another_back(make_store: MakeStore) -> None:
    store = make_store(max_adapters=2)
    store._need_of = lambda digest: {"a": 2, "b": 1}.get(digest, 0)
    use(store, "a")
    store.fetch("b").result(TIMEOUT_S)
    waiting = store.fetch("c")
    assert store.resident() == ("a", "b") and not waiting.done()
    store.release("b")
    waiting.result(TIMEOUT_S)
    assert store.resident() == ("a", "c")
    store.release("c")
    store._need_of = lambda digest: 2
    use(store, "d")
    assert store.resident() == ("c", "d")


def test_a_read_that_hangs_is_given_up_and_its_room_is_free(make_store: MakeStore, disk: Disk) -> None:
    store = make_store(max_adapters=1, read_timeout_s=0.05)
    began, _ = disk.hold("a")
    hung, waiting = store.fetch("a"), store.fetch("b")
    assert began.wait(TIMEOUT_S)
    error = error_of(hung)
    assert isinstance(error, AdapterUnavailableError) and "Reading the adapter's files took more" in error.message
    assert waiting.result(TIMEOUT_S).digest == "b"
    store.check_integrity()


def test_what_hangs_is_not_read_again_before_it_ends_or_is_registered_again(
    make_store: MakeStore, disk: Disk, clock: Clock
) -> None:
    store = make_store(read_timeout_s=0.05)
    began, may_end = disk.hold("a")
    assert isinstance(error_of(store.fetch("a")), AdapterUnavailableError)
    assert began.wait(TIMEOUT_S)
    clock.now_s += 1000.0
    assert isinstance(error_of(store.fetch("a")), AdapterUnavailableError)
    prefetched(store, "a")
    assert disk.loads["a"] == 1
    store.register(spec("a"))
    assert isinstance(error_of(store.fetch("a")), AdapterUnavailableError)
    assert disk.loads["a"] == 2, "its files may be others now"
    may_end.set()
    clock.now_s += 1000.0
    while store.fetch("a").exception(TIMEOUT_S) is not None:  # until both reads have ended
        clock.now_s += 1000.0
    store.release("a")
    store.check_integrity()


def test_a_prefetch_that_hangs_is_given_up_and_remembered(make_store: MakeStore, disk: Disk) -> None:
    store = make_store(max_adapters=2, read_timeout_s=0.05)
    began, _ = disk.hold("a")
    store.prefetch("a")
    assert began.wait(TIMEOUT_S)
    prefetched(store, "b")
    assert isinstance(error_of(store.fetch("a")), AdapterUnavailableError)
    assert disk.loads["a"] == 1
    store.check_integrity()


def test_more_reads_hang_than_there_are_threads_and_others_go_on(make_store: MakeStore, disk: Disk) -> None:
    names = [f"hung{n}" for n in range(6)]
    store = make_store(names="b", read_timeout_s=TIMEOUT_S)
    for name in names:
        store.register(spec(name))
        disk.hold(name)
    hung = [store.fetch(name) for name in names]
    assert take(store, "b").digest == "b"
    assert not any(future.done() for future in hung)
    assert store.num_reading == 6


def test_a_large_adapter_may_take_longer(make_store: MakeStore) -> None:
    store = make_store(names="", max_bytes=1 << 30, read_timeout_s=30.0)
    store.register(spec("small", 10))
    store.register(spec("large", 500 << 20))
    assert store._limit_s("small") == pytest.approx(30.0)
    assert store._limit_s("large") == pytest.approx(80.0)


def test_whoever_waits_for_reads_is_told_of_each_whatever_came_of_it(make_store: MakeStore, disk: Disk) -> None:
    told = threading.Semaphore(0)
    store = make_store(has_read=told.release)
    disk.broken["b"] = AdapterUnavailableError("gone")
    for name in "abc":
        (store.prefetch if name == "c" else store.fetch)(name)
        assert told.acquire(timeout=TIMEOUT_S)
