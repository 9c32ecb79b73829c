"""The host tier: verified adapters by digest, and a cache of the loaded ones, bounded by bytes and by count.

Thread-safe. An adapter that was handed out stays until it is released; what nobody holds is evicted when room is
needed, in the order that the eviction policy gives. A fetch for which there is no room waits for a release: the bounds
are kept.

A prefetch is only a hint. It has a thread of its own and never makes a fetch wait: a fetch may take the room even of
one that is being read, whose memory is then free when that read ends.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

import torch

from lorafleet.workers.adapters.background import background_threads
from lorafleet.workers.adapters.format import AdapterSpec, HostAdapter, load_adapter
from lorafleet.workers.adapters.modules import BaseShapes
from lorafleet.workers.adapters.open_files import OpenFiles
from lorafleet.workers.engine.eviction import Eviction, LeastRecentlyUsed
from lorafleet.workers.errors import AdapterRefusedError, AdapterUnavailableError, InternalError, LoRAFleetError

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0
_NUM_READERS = 4
_MAX_PREFETCHES = 64  # that wait for their thread; more are left out
_CLOSED = "The adapter store is closed."


@dataclass(frozen=True, slots=True)
class StoreStats:
    num_registered: int
    num_cached: int
    bytes: int
    usage: float  # of the bytes or of the number that it may hold, whichever is nearer to its limit
    hits: int
    loads: int
    failures: int
    evictions: int


@dataclass(slots=True)
class _Failure:
    error: LoRAFleetError
    retry_at: float
    delay_s: float


@dataclass(slots=True)
class _Entry:
    """A cached adapter, or one that is being loaded (its future is not done); its bytes are reserved either way."""

    future: Future[HostAdapter]
    num_bytes: int
    holders: int
    load_s: float = 0.0  # that reading it took
    is_ahead: bool = False  # prefetched, and not fetched since


class AdapterStore:
    """`is_in_use`: which adapters go last, since requests that have begun with them must be able to go on, even behind
    a preemption and when somebody has written into the file since. `load` and `num_bytes`: of an adapter of which not
    all is kept. `clock` is for tests.
    """

    def __init__(
        self,
        base: BaseShapes,
        *,
        max_bytes: int,
        max_adapters: int | None,
        dtype: torch.dtype,
        eviction: Eviction | None = None,
        is_in_use: Callable[[str], bool] = lambda _: False,
        load: Callable[..., HostAdapter] = load_adapter,
        num_bytes: Callable[[AdapterSpec], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base = base
        self._max_bytes = max_bytes
        self._max_adapters = max_adapters
        self._dtype = dtype
        self._eviction = eviction or LeastRecentlyUsed()
        self._is_in_use = is_in_use
        self._load = load
        self._size = num_bytes or (lambda spec: spec.num_bytes(dtype))
        self._clock = clock
        self._lock = threading.Lock()
        self._specs: dict[str, list[AdapterSpec]] = {}  # where each digest was seen, last first
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._queue: OrderedDict[str, _Entry] = OrderedDict()  # fetches that wait for room, oldest first
        self._failures: dict[str, _Failure] = {}
        self._bytes = 0
        self._closed = False
        self._hits = self._loads = self._num_failures = self._evictions = 0
        self._prefetches: set[str] = set()  # that wait for their thread
        self._files = OpenFiles()
        self._readers = background_threads(_NUM_READERS, "lorafleet-adapter")
        self._prefetcher = background_threads(1, "lorafleet-prefetch")

    def register(self, spec: AdapterSpec) -> None:
        """Make an adapter fetchable. Registering a digest again adds another path to it, which is tried first, and
        forgets earlier failures.

        Raises `AdapterRefusedError` when it alone is larger than the whole cache.
        """
        num_bytes = self._size(spec)
        if num_bytes > self._max_bytes:
            raise AdapterRefusedError(
                f"{spec.folder} takes {num_bytes} bytes, the host cache holds {self._max_bytes}. Raise "
                "--lora-host-cache-bytes.",
                reason="larger_than_host_cache",
            )
        with self._lock:
            others = [known for known in self._specs.get(spec.digest, ()) if known.path != spec.path]
            self._specs[spec.digest] = [spec, *others]
            self._failures.pop(spec.digest, None)

    def forget(self, digest: str) -> int:
        """Take an adapter that nobody holds out of the store; the bytes of host memory that this freed."""
        with self._lock:
            del self._specs[digest]
            self._failures.pop(digest, None)
            entry = self._entries.pop(digest, None)
            if entry is None:
                return 0
            assert not entry.holders
            self._eviction.drop(digest)
            self._bytes -= entry.num_bytes
            self._admit()
            return entry.num_bytes

    def hold_files(self, digest: str) -> None:
        """Let a registered adapter be readable until `release_files`, though its files be replaced or deleted."""
        with self._lock:
            specs = tuple(self._specs.get(digest, ()))
        self._files.hold(digest, specs)

    def release_files(self, digest: str) -> None:
        self._files.release(digest)

    def spec(self, digest: str) -> AdapterSpec | None:
        """Of a registered adapter; None for any other."""
        with self._lock:
            specs = self._specs.get(digest)
            return None if specs is None else specs[0]

    def fetch(self, digest: str) -> Future[HostAdapter]:
        """The adapter, held until `release`; loads it on a reader thread if need be, once for all who ask.

        The future fails with `AdapterUnavailableError` and the like; nothing is held then, and for a while (1 s,
        doubling to 30 s) the same error is given again without another look at the disk.
        """
        with self._lock:
            if self._closed:
                return _failed(InternalError(_CLOSED))
            entry = self._entries.get(digest) or self._queue.get(digest)
            if entry is not None:
                self._hold(digest, entry)
                return entry.future
            error = self._recent_failure(digest)
            if error is not None:
                return _failed(error)
            entry = _Entry(Future(), self._size(self._specs[digest][0]), holders=1)
            self._queue[digest] = entry
            self._admit()
            return entry.future

    def fetch_resident(self, digest: str) -> HostAdapter | None:
        """The same without a wait: None, and nothing is held, when it is not in the cache now."""
        with self._lock:
            entry = self._entries.get(digest)
            if self._closed or entry is None or not entry.future.done() or entry.future.exception() is not None:
                return None
            self._hold(digest, entry)
            return entry.future.result()

    def is_resident(self, digest: str) -> bool:
        """Whether an adapter is in the cache now. It asks for no lock."""
        entry = self._entries.get(digest)
        return entry is not None and entry.future.done() and entry.future.exception() is None

    def prefetch(self, digest: str) -> None:
        """Bring an adapter that is to be fetched soon into the cache, in the background, if there is room at once.

        Holds nothing, and evicts nothing that is held or was itself prefetched. When it fails, nobody hears of it but
        those who have fetched the adapter meanwhile.
        """
        with self._lock:
            entry = self._entries.get(digest)
            if entry is not None:
                if not entry.holders:
                    entry.is_ahead = True
                    self._entries.move_to_end(digest)
            elif not self._closed and digest not in self._prefetches and len(self._prefetches) < _MAX_PREFETCHES:
                self._prefetches.add(digest)
                self._prefetcher.submit(self._prefetch, digest)

    def release(self, digest: str) -> None:
        """Give back what one successful `fetch` handed out."""
        with self._lock:
            self._entries[digest].holders -= 1
            self._admit()

    def resident(self) -> tuple[str, ...]:
        """Loaded adapters, least recently used first."""
        with self._lock:
            return tuple(digest for digest, entry in self._entries.items() if entry.future.done())

    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats(
                num_registered=len(self._specs),
                num_cached=len(self._entries),
                bytes=self._bytes,
                usage=max(
                    self._bytes / (self._max_bytes or math.inf),  # without LoRA there is no room, and nothing in it
                    len(self._entries) / (self._max_adapters or math.inf),
                ),
                hits=self._hits,
                loads=self._loads,
                failures=self._num_failures,
                evictions=self._evictions,
            )

    def close(self) -> None:
        """Let running reads end, stop the threads; fetches that wait for room, or come later, fail."""
        with self._lock:
            self._closed = True
            waiting = [entry.future for entry in self._queue.values()]
            self._queue.clear()
        for future in waiting:
            future.set_exception(InternalError(_CLOSED))
        self._readers.shutdown(wait=True)
        self._prefetcher.shutdown(wait=True, cancel_futures=True)
        self._files.close()

    @property
    def num_open_files(self) -> int:
        """Of the adapters that requests name."""
        return self._files.num_files()

    def check_integrity(self) -> None:
        """The books agree. For tests."""
        with self._lock:
            assert self._bytes == sum(entry.num_bytes for entry in self._entries.values()) <= self._max_bytes
            assert self._max_adapters is None or len(self._entries) <= self._max_adapters
            assert all(entry.holders >= 0 for entry in self._entries.values())
            assert not self._entries.keys() & self._queue.keys()
            assert all(entry.holders or entry.is_ahead or entry.future.done() for entry in self._entries.values())
            assert all(entry.holders and not entry.is_ahead for entry in self._queue.values())
            assert not any(entry.holders and entry.is_ahead for entry in self._entries.values())
            assert len(self._prefetches) <= _MAX_PREFETCHES

    def _hold(self, digest: str, entry: _Entry) -> None:
        """For one fetch. The lock is held."""
        entry.holders += 1
        entry.is_ahead = False
        self._hits += 1
        if digest in self._entries:
            self._entries.move_to_end(digest)
            self._eviction.use(digest, num_bytes=entry.num_bytes, reload_s=entry.load_s)

    def _admit(self) -> None:
        """Start the loads for which there is room, oldest first. The lock is held."""
        while self._queue:
            digest, entry = next(iter(self._queue.items()))
            if not self._make_room(entry.num_bytes):
                return
            del self._queue[digest]
            self._entries[digest] = entry
            self._bytes += entry.num_bytes
            self._readers.submit(self._read, self._specs[digest], entry)

    def _make_room(self, num_bytes: int) -> bool:
        if self._fits(num_bytes):
            return True
        spare = self._eviction.order(digest for digest, entry in self._entries.items() if not entry.holders)
        for digest in sorted(spare, key=self._is_in_use):  # stable
            if self._fits(num_bytes):
                break
            self._evict(digest)
        return self._fits(num_bytes)

    def _make_room_ahead(self, num_bytes: int) -> bool:
        """Room for a prefetch: only at the cost of what no prefetch brought, and only if that is enough."""
        spare = self._eviction.order(
            digest
            for digest, entry in self._entries.items()
            if not entry.holders and not entry.is_ahead and not self._is_in_use(digest)
        )
        if not self._fits(num_bytes, but=spare):
            return False
        for digest in spare:
            if self._fits(num_bytes):
                break
            self._evict(digest)
        return True

    def _fits(self, num_bytes: int, *, but: Sequence[str] = ()) -> bool:
        """Whether there is room beside what is cached, `but` for some."""
        num_cached = len(self._entries) - len(but)
        cached_bytes = self._bytes - sum(self._entries[digest].num_bytes for digest in but)
        few = self._max_adapters is None or num_cached < self._max_adapters
        return few and cached_bytes + num_bytes <= self._max_bytes

    def _evict(self, digest: str) -> None:
        self._eviction.evict(digest)
        self._bytes -= self._entries.pop(digest).num_bytes
        self._evictions += 1

    def _prefetch(self, digest: str) -> None:
        """On the prefetching thread."""
        with self._lock:
            self._prefetches.discard(digest)
            # Whoever waits for room comes first; that includes a fetch of this very adapter.
            if self._closed or digest in self._entries or self._queue or self._recent_failure(digest) is not None:
                return
            specs = self._specs.get(digest)
            if specs is None:  # forgotten meanwhile
                return
            entry = _Entry(Future(), self._size(specs[0]), holders=0, is_ahead=True)
            if not self._make_room_ahead(entry.num_bytes):
                return
            self._entries[digest] = entry
            self._bytes += entry.num_bytes
        self._read(specs, entry)

    def _recent_failure(self, digest: str) -> LoRAFleetError | None:
        """The error of a failed load that is not to be tried again yet."""
        failure = self._failures.get(digest)
        return failure.error if failure is not None and self._clock() < failure.retry_at else None

    def _read(self, specs: Sequence[AdapterSpec], entry: _Entry) -> None:
        digest = specs[0].digest
        began = self._clock()
        try:
            adapter = self._load_first(specs)
        except Exception as caught:
            error = (
                caught if isinstance(caught, LoRAFleetError) else InternalError(f"Reading an adapter failed: {caught}")
            )
            with self._lock:
                if entry.holders:  # else it was only a hint: a fetch shall look again
                    delay_s = (
                        min(2 * self._failures[digest].delay_s, _LAST_RETRY_S)
                        if digest in self._failures
                        else _FIRST_RETRY_S
                    )
                    self._failures[digest] = _Failure(error, self._clock() + delay_s, delay_s)
                if self._entries.get(digest) is entry:  # no fetch has taken the room, and it was not forgotten
                    del self._entries[digest]
                    self._eviction.drop(digest)
                    self._bytes -= entry.num_bytes
                self._num_failures += 1
                self._admit()
            entry.future.set_exception(error)
            return
        with self._lock:
            self._failures.pop(digest, None)
            self._loads += 1
            entry.load_s = self._clock() - began
            if self._entries.get(digest) is entry:
                self._eviction.use(digest, num_bytes=entry.num_bytes, reload_s=entry.load_s)
        entry.future.set_result(adapter)

    def _load_first(self, specs: Sequence[AdapterSpec]) -> HostAdapter:
        """From its open files, or else from the first path where it still is."""
        with self._files.borrow(specs[0].digest) as held:
            if held is not None:
                with suppress(AdapterUnavailableError):
                    return self._load(held.spec, self._base, self._dtype, held.files)
        for spec in specs[:-1]:
            with suppress(AdapterUnavailableError):
                return self._load(spec, self._base, self._dtype)
        return self._load(specs[-1], self._base, self._dtype)


def _failed(error: LoRAFleetError) -> Future[HostAdapter]:
    future: Future[HostAdapter] = Future()
    future.set_exception(error)
    return future
