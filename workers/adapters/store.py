"""The host tier: verified adapters by digest, and an LRU cache of the loaded ones, bounded by bytes and by count.

Thread-safe. An adapter that was handed out stays until it is released; what nobody holds is evicted, least recently
used first, when room is needed. A fetch for which there is no room waits for a release: the bounds are kept.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from lorafleet.workers.adapters.format import AdapterSpec, BaseShapes, HostAdapter, load_adapter
from lorafleet.workers.errors import AdapterRefusedError, InternalError, LoRAFleetError

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0
_NUM_READERS = 4
_CLOSED = "The adapter store is closed."


@dataclass(frozen=True, slots=True)
class StoreStats:
    num_registered: int
    num_cached: int
    bytes: int
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


class AdapterStore:
    """`load` and `clock` are for tests."""

    def __init__(
        self,
        base: BaseShapes,
        *,
        max_bytes: int,
        max_adapters: int | None,
        dtype: torch.dtype,
        load: Callable[[AdapterSpec, BaseShapes, torch.dtype], HostAdapter] = load_adapter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base = base
        self._max_bytes = max_bytes
        self._max_adapters = max_adapters
        self._dtype = dtype
        self._load = load
        self._clock = clock
        self._lock = threading.Lock()
        self._specs: dict[str, AdapterSpec] = {}
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._queue: OrderedDict[str, _Entry] = OrderedDict()  # fetches that wait for room, oldest first
        self._failures: dict[str, _Failure] = {}
        self._bytes = 0
        self._closed = False
        self._hits = self._loads = self._num_failures = self._evictions = 0
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="lorafleet-adapter")

    def register(self, spec: AdapterSpec) -> None:
        """Make an adapter fetchable. Registering a digest again takes the newer path and forgets earlier failures.

        Raises `AdapterRefusedError` when it alone is larger than the whole cache.
        """
        num_bytes = self._size(spec)
        if num_bytes > self._max_bytes:
            raise AdapterRefusedError(
                f"{spec.path} takes {num_bytes} bytes, the host cache holds {self._max_bytes}. Raise "
                "--lora-host-cache-bytes.",
                reason="larger_than_host_cache",
            )
        with self._lock:
            self._specs[spec.digest] = spec
            self._failures.pop(spec.digest, None)

    def is_registered(self, digest: str) -> bool:
        with self._lock:
            return digest in self._specs

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
                entry.holders += 1
                self._hits += 1
                if digest in self._entries:
                    self._entries.move_to_end(digest)
                return entry.future
            failure = self._failures.get(digest)
            if failure is not None and self._clock() < failure.retry_at:
                return _failed(failure.error)
            entry = _Entry(Future(), self._size(self._specs[digest]), holders=1)
            self._queue[digest] = entry
            self._admit()
            return entry.future

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
                hits=self._hits,
                loads=self._loads,
                failures=self._num_failures,
                evictions=self._evictions,
            )

    def close(self) -> None:
        """Let running reads end, stop the reader threads; fetches that wait for room, or come later, fail."""
        with self._lock:
            self._closed = True
            waiting = [entry.future for entry in self._queue.values()]
            self._queue.clear()
        for future in waiting:
            future.set_exception(InternalError(_CLOSED))
        self._readers.shutdown(wait=True)

    def check_integrity(self) -> None:
        """The books agree. For tests."""
        with self._lock:
            assert self._bytes == sum(entry.num_bytes for entry in self._entries.values()) <= self._max_bytes
            assert self._max_adapters is None or len(self._entries) <= self._max_adapters
            assert all(entry.holders >= 0 for entry in self._entries.values())
            assert not self._entries.keys() & self._queue.keys()

    def _size(self, spec: AdapterSpec) -> int:
        return spec.num_elements * self._dtype.itemsize

    def _admit(self) -> None:
        """Start the loads for which there is room, oldest first. The lock is held."""
        while self._queue:
            digest, entry = next(iter(self._queue.items()))
            if not self._make_room(entry.num_bytes):
                return
            del self._queue[digest]
            self._entries[digest] = entry
            self._bytes += entry.num_bytes
            self._readers.submit(self._read, digest, entry)

    def _make_room(self, num_bytes: int) -> bool:
        def fits() -> bool:
            few = self._max_adapters is None or len(self._entries) < self._max_adapters
            return few and self._bytes + num_bytes <= self._max_bytes

        for digest in [digest for digest, entry in self._entries.items() if not entry.holders]:
            if fits():
                break
            self._bytes -= self._entries.pop(digest).num_bytes
            self._evictions += 1
        return fits()

    def _read(self, digest: str, entry: _Entry) -> None:
        try:
            adapter = self._load(self._specs[digest], self._base, self._dtype)
        except Exception as caught:
            error = (
                caught if isinstance(caught, LoRAFleetError) else InternalError(f"Reading an adapter failed: {caught}")
            )
            with self._lock:
                delay_s = (
                    min(2 * self._failures[digest].delay_s, _LAST_RETRY_S)
                    if digest in self._failures
                    else _FIRST_RETRY_S
                )
                self._failures[digest] = _Failure(error, self._clock() + delay_s, delay_s)
                del self._entries[digest]
                self._bytes -= entry.num_bytes
                self._num_failures += 1
                self._admit()
            entry.future.set_exception(error)
            return
        with self._lock:
            self._failures.pop(digest, None)
            self._loads += 1
        entry.future.set_result(adapter)


def _failed(error: LoRAFleetError) -> Future[HostAdapter]:
    future: Future[HostAdapter] = Future()
    future.set_exception(error)
    return future
