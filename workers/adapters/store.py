"""The host tier: verified adapters by digest, and a cache of loaded ones, bounded by bytes and by count.

Thread-safe. A fetched adapter stays until it is released; one without holders is evicted when room is needed, in the
eviction policy's order. A fetch without room waits for a release: the bounds always hold.

A read that takes too long is abandoned: its fetches fail, its room is freed, others continue. While it hangs, its
adapter is not read again unless it is registered again.

A prefetch is only a hint. It has its own thread and never delays a fetch: a fetch may take the room even of a running
prefetch, whose memory is freed when its read ends.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from lorafleet.workers.adapters.background import CLOSE_S, BackgroundThreads
from lorafleet.workers.adapters.format import AdapterSpec, HostAdapter, load_adapter
from lorafleet.workers.adapters.modules import BaseShapes
from lorafleet.workers.adapters.open_files import OpenAdapter, OpenFiles
from lorafleet.workers.errors import AdapterRefusedError, AdapterUnavailableError, InternalError, LoRAFleetError
from lorafleet.workers.scheduling.eviction import Eviction, LeastRecentlyUsed

logger = logging.getLogger(__name__)

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0
_NUM_READERS = 4
_MAX_PREFETCHES = 64  # in the queue; more are ignored
_LEAST_BYTES_A_S = 10 << 20  # a read gets a second more for each of these
_CLOSED = "The adapter store is closed."


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    num_registered: int
    num_cached: int
    bytes: int
    usage: float  # of the byte or the count limit, whichever is nearer
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
    """A cached adapter, or one being loaded (its future is not done); its bytes are reserved either way."""

    future: Future[HostAdapter]
    num_bytes: int
    holders: int
    load_s: float = 0.0  # how long reading it took
    is_ahead: bool = False  # prefetched, and not fetched since


@dataclass(slots=True, eq=False)
class _Read:
    """One read of an adapter's files, on a thread."""

    digest: str
    entry: _Entry | None = None  # None: a prefetch that has not begun or found no room
    specs: tuple[AdapterSpec, ...] = ()
    began: float = 0.0
    has_ended: bool = False  # its thread is done with it


class AdapterStore:
    """`need_of`: 2 for adapters of requests that have begun: they are evicted last, since those requests must be able
    to resume even if the file was overwritten. 1 for other adapters to evict late. `load` and `num_bytes`: for an
    adapter of which only a part is kept. `read_timeout_s`: after which a read is abandoned; large adapters get longer.
    `has_read`: called on some thread after each read, successful or not. `clock` is for tests.
    """

    def __init__(
        self,
        base: BaseShapes,
        *,
        max_bytes: int,
        max_adapters: int | None,
        dtype: torch.dtype,
        eviction: Eviction | None = None,
        need_of: Callable[[str], int] = lambda _: 0,
        load: Callable[..., HostAdapter] = load_adapter,
        num_bytes: Callable[[AdapterSpec], int] | None = None,
        read_timeout_s: float = 30.0,
        has_read: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base = base
        self._max_bytes = max_bytes
        self._max_adapters = max_adapters
        self._dtype = dtype
        self._eviction = eviction or LeastRecentlyUsed()
        self._need_of = need_of
        self._load = load
        self._size = num_bytes or (lambda spec: spec.num_bytes(dtype))
        self._read_timeout_s = read_timeout_s
        self._has_read = has_read
        self._clock = clock
        self._lock = threading.Lock()
        self._specs: dict[str, list[AdapterSpec]] = {}  # where each digest was seen, newest first
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._queue: OrderedDict[str, _Entry] = OrderedDict()  # fetches that wait for room, oldest first
        self._failures: dict[str, _Failure] = {}
        self._hung: dict[str, _Read] = {}  # abandoned reads whose threads still hang
        self._bytes = 0
        self._closed = False
        self._hits = self._loads = self._num_failures = self._evictions = 0
        self._prefetches: set[str] = set()  # in the queue
        self._files = OpenFiles(limit_s=read_timeout_s)
        self._readers = BackgroundThreads(_NUM_READERS, "lorafleet-adapter")
        self._prefetcher = BackgroundThreads(1, "lorafleet-prefetch")

    def register(self, spec: AdapterSpec) -> None:
        """Make an adapter fetchable. Registering a digest again adds another path, tried first, and clears failures.

        Raises `AdapterRefusedError` if it alone exceeds the whole cache.
        """
        num_bytes = self._size(spec)
        if num_bytes > self._max_bytes:
            raise AdapterRefusedError(
                f"{spec.folder} takes {num_bytes} bytes; the host cache holds {self._max_bytes}. Raise "
                "--lora-host-cache-bytes.",
                reason="larger_than_host_cache",
            )
        with self._lock:
            others = [known for known in self._specs.get(spec.digest, ()) if known.path != spec.path]
            self._specs[spec.digest] = [spec, *others]
            self._failures.pop(spec.digest, None)
            self._hung.pop(spec.digest, None)

    def forget(self, digest: str) -> int:
        """Remove an adapter without holders; return the bytes of host memory freed."""
        with self._lock:
            del self._specs[digest]
            self._failures.pop(digest, None)
            self._hung.pop(digest, None)
            entry = self._entries.pop(digest, None)
            if entry is None:
                return 0
            assert not entry.holders
            self._eviction.drop(digest)
            self._bytes -= entry.num_bytes
            self._admit()
            return entry.num_bytes

    def hold_files(self, digest: str) -> Future[OpenAdapter | None]:
        """Keep a registered adapter readable until `release_files`, even if its files are replaced or deleted.

        This holds once the future is done.
        """
        with self._lock:
            specs = tuple(self._specs.get(digest, ()))
        return self._files.hold(digest, specs)

    def release_files(self, digest: str) -> None:
        self._files.release(digest)

    def spec(self, digest: str) -> AdapterSpec | None:
        """Return a registered adapter's spec; None if it is not registered."""
        with self._lock:
            specs = self._specs.get(digest)
            return None if specs is None else specs[0]

    def fetch(self, digest: str) -> Future[HostAdapter]:
        """Return the adapter, held until `release`; a reader thread loads it if needed, once for all callers.

        The future fails with `AdapterUnavailableError` and the like. Nothing is held then, and for a while (1 s,
        doubling to 30 s) the same error is returned without another read.
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
        """`fetch` without waiting: return None, and hold nothing, if the adapter is not cached now."""
        with self._lock:
            entry = self._entries.get(digest)
            if self._closed or entry is None or not entry.future.done() or entry.future.exception() is not None:
                return None
            self._hold(digest, entry)
            return entry.future.result()

    def is_resident(self, digest: str) -> bool:
        """Return whether an adapter is cached now. Takes no lock."""
        entry = self._entries.get(digest)
        return entry is not None and entry.future.done() and entry.future.exception() is None

    def prefetch(self, digest: str) -> None:
        """Load an adapter that will be fetched soon into the cache, in the background, if there is room at once.

        Holds nothing. Evicts nothing that is held or was itself prefetched. Only fetches made meanwhile see a failure.
        """
        with self._lock:
            entry = self._entries.get(digest)
            if entry is not None:
                if not entry.holders:
                    entry.is_ahead = True
                    self._entries.move_to_end(digest)
            elif not self._closed and digest not in self._prefetches and len(self._prefetches) < _MAX_PREFETCHES:
                self._prefetches.add(digest)
                read = _Read(digest)
                self._prefetcher.submit(
                    partial(self._read_ahead, read), limit_s=self._limit_s(digest), done=partial(self._take, read)
                )

    def release(self, digest: str) -> None:
        """Return one successful `fetch`'s hold."""
        with self._lock:
            self._entries[digest].holders -= 1
            self._admit()

    def resident(self) -> tuple[str, ...]:
        """Return the loaded adapters, least recently used first."""
        with self._lock:
            return tuple(digest for digest, entry in self._entries.items() if entry.future.done())

    @property
    def num_reading(self) -> int:
        """Return the number of adapters being read or waiting to be."""
        with self._lock:
            num_begun = sum(not entry.future.done() for entry in self._entries.values())
            return num_begun + len(self._queue) + len(self._prefetches)

    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats(
                num_registered=len(self._specs),
                num_cached=len(self._entries),
                bytes=self._bytes,
                usage=max(
                    self._bytes / (self._max_bytes or math.inf),  # without LoRA both are 0
                    len(self._entries) / (self._max_adapters or math.inf),
                ),
                hits=self._hits,
                loads=self._loads,
                failures=self._num_failures,
                evictions=self._evictions,
            )

    def close(self, wait_s: float = CLOSE_S) -> None:
        """Wait at most `wait_s` for running reads, then stop the threads; all other fetches fail."""
        deadline = time.monotonic() + wait_s
        with self._lock:
            self._closed = True
            waiting = [entry.future for entry in self._queue.values()]
            self._queue.clear()
        for future in waiting:
            future.set_exception(InternalError(_CLOSED))
        self._readers.close(wait_s, drops=False)
        self._prefetcher.close(max(0.0, deadline - time.monotonic()))
        self._files.close()

    @property
    def num_open_files(self) -> int:
        """Return the number of files open for adapters that requests use."""
        return self._files.num_files()

    def check_integrity(self) -> None:
        """Check that the counts agree. For tests."""
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
        """Hold an entry for one fetch. The lock is held."""
        entry.holders += 1
        entry.is_ahead = False
        self._hits += 1
        if digest in self._entries:
            self._entries.move_to_end(digest)
            self._eviction.use(digest, num_bytes=entry.num_bytes, reload_s=entry.load_s)

    def _admit(self) -> None:
        """Start the queued loads for which there is room, oldest first. The lock is held."""
        while self._queue:
            digest, entry = next(iter(self._queue.items()))
            if not self._make_room(entry.num_bytes):
                return
            del self._queue[digest]
            self._entries[digest] = entry
            self._bytes += entry.num_bytes
            read = _Read(digest, entry, tuple(self._specs[digest]))
            self._readers.submit(
                partial(self._read, read),
                limit_s=self._limit_s(digest),
                what="Reading the adapter's files",
                done=partial(self._take, read),
            )

    def _make_room(self, num_bytes: int) -> bool:
        if self._fits(num_bytes):
            return True
        spare = self._eviction.order(digest for digest, entry in self._entries.items() if not entry.holders)
        others_go = any(entry.holders for entry in self._entries.values())  # soon, when holders release them
        for digest in sorted(spare, key=self._need_of):  # stable
            if self._fits(num_bytes) or (others_go and self._need_of(digest) > 1):
                break
            self._evict(digest)
        return self._fits(num_bytes)

    def _make_room_ahead(self, num_bytes: int) -> bool:
        """Make room for a prefetch by evicting only fetched adapters, and only if that is enough."""
        spare = self._eviction.order(
            digest
            for digest, entry in self._entries.items()
            if not entry.holders and not entry.is_ahead and not self._need_of(digest)
        )
        if not self._fits(num_bytes, but=spare):
            return False
        for digest in spare:
            if self._fits(num_bytes):
                break
            self._evict(digest)
        return True

    def _fits(self, num_bytes: int, *, but: Sequence[str] = ()) -> bool:
        """Return whether there is room besides what is cached, not counting `but`."""
        num_cached = len(self._entries) - len(but)
        cached_bytes = self._bytes - sum(self._entries[digest].num_bytes for digest in but)
        few = self._max_adapters is None or num_cached < self._max_adapters
        return few and cached_bytes + num_bytes <= self._max_bytes

    def _evict(self, digest: str) -> None:
        self._eviction.evict(digest)
        self._bytes -= self._entries.pop(digest).num_bytes
        self._evictions += 1

    def _read_ahead(self, read: _Read) -> HostAdapter | None:
        """Run a prefetch, on the prefetching thread."""
        digest = read.digest
        with self._lock:
            self._prefetches.discard(digest)
            # Queued fetches come first; that includes a fetch of this very adapter.
            if self._closed or digest in self._entries or self._queue or self._recent_failure(digest) is not None:
                return None
            specs = self._specs.get(digest)
            if specs is None:  # forgotten meanwhile
                return None
            entry = _Entry(Future(), self._size(specs[0]), holders=0, is_ahead=True)
            if not self._make_room_ahead(entry.num_bytes):
                return None
            self._entries[digest] = entry
            self._bytes += entry.num_bytes
            read.entry, read.specs = entry, tuple(specs)
        return self._read(read)

    def _read(self, read: _Read) -> HostAdapter:
        """Read an adapter's files, on a thread that may hang in it."""
        read.began = self._clock()
        try:
            return self._load_first(read.specs)
        finally:
            with self._lock:
                read.has_ended = True
                if self._hung.get(read.digest) is read:
                    del self._hung[read.digest]

    def _limit_s(self, digest: str) -> float:
        """Return the time limit of a read. The lock is held."""
        specs = self._specs.get(digest)
        return self._read_timeout_s + (0 if specs is None else self._size(specs[0]) / _LEAST_BYTES_A_S)

    def _recent_failure(self, digest: str) -> LoRAFleetError | None:
        """Return the error of a failed load that must not be retried yet."""
        failure = self._failures.get(digest)
        if failure is None or (self._clock() >= failure.retry_at and digest not in self._hung):
            return None
        return failure.error

    def _take(self, read: _Read, reading: Future[HostAdapter] | Future[HostAdapter | None]) -> None:
        """Record a read's outcome and complete its future."""
        digest, entry, caught = read.digest, read.entry, reading.exception()
        if entry is None:  # a prefetch that did not read
            with self._lock:
                self._prefetches.discard(digest)
            self._has_read()
            return
        if caught is not None:
            where = digest, read.specs[0].path
            if isinstance(caught, LoRAFleetError):
                error = caught
                logger.warning("adapter %s cannot be read from %s: %s", *where, error.message)
            else:
                error = InternalError("Reading an adapter failed; the worker's log says why.")
                logger.error("adapter %s cannot be read from %s", *where, exc_info=caught)
            with self._lock:
                is_hung = not read.has_ended and digest in self._specs
                if is_hung:
                    self._hung[digest] = read
                if entry.holders or is_hung:  # else it was only a hint: a fetch must read again
                    delay_s = (
                        min(2 * self._failures[digest].delay_s, _LAST_RETRY_S)
                        if digest in self._failures
                        else _FIRST_RETRY_S
                    )
                    self._failures[digest] = _Failure(error, self._clock() + delay_s, delay_s)
                if self._entries.get(digest) is entry:  # no fetch took its room, and it was not forgotten
                    del self._entries[digest]
                    self._eviction.drop(digest)
                    self._bytes -= entry.num_bytes
                self._num_failures += 1
                self._admit()
            entry.future.set_exception(error)
            self._has_read()
            return
        adapter = reading.result()
        assert adapter is not None
        with self._lock:
            self._failures.pop(digest, None)
            self._loads += 1
            entry.load_s = self._clock() - read.began
            if self._entries.get(digest) is entry:
                self._eviction.use(digest, num_bytes=entry.num_bytes, reload_s=entry.load_s)
        entry.future.set_result(adapter)
        self._has_read()

    def _load_first(self, specs: Sequence[AdapterSpec]) -> HostAdapter:
        """Load from the open files, or else from the first path where the adapter still is."""
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
