"""The host tier: verified adapters by digest, and a cache of the loaded ones, bounded by bytes and by count.

Thread-safe. An adapter that was handed out stays until it is released; what nobody holds is evicted when room is
needed, in the order that the eviction policy gives. A fetch for which there is no room waits for a release: the bounds
are kept.

A read that takes too long is given up: its fetches fail, its room is free, others go on. While it hangs its adapter is
not read again, unless it is registered again.

A prefetch is only a hint. It has a thread of its own and never makes a fetch wait: a fetch may take the room even of
one that is being read, whose memory is then free when that read ends.
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
from lorafleet.workers.engine.eviction import Eviction, LeastRecentlyUsed
from lorafleet.workers.errors import AdapterRefusedError, AdapterUnavailableError, InternalError, LoRAFleetError

logger = logging.getLogger(__name__)

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0
_NUM_READERS = 4
_MAX_PREFETCHES = 64  # that wait for their thread; more are left out
_LEAST_BYTES_A_S = 10 << 20  # a read may take a second more for each of these
_CLOSED = "The adapter store is closed."


@dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclass(slots=True, eq=False)
class _Read:
    """One look at an adapter's files, on a thread."""

    digest: str
    entry: _Entry | None = None  # None: a prefetch that has not begun, or for which there was no room
    specs: tuple[AdapterSpec, ...] = ()
    began: float = 0.0
    has_ended: bool = False  # its thread is done with it


class AdapterStore:
    """`need_of`: 2 for adapters of requests that have begun, which must be able to resume, even when somebody has
    written into the file since: they go only where nothing else makes room. 1 for others that go late. `load` and
    `num_bytes`: of an adapter of which not all is kept. `read_timeout_s`: after which a read is given up; a large
    adapter has longer. `has_read`: called on some thread after each read, whatever came of it. `clock` is for tests.
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
        self._specs: dict[str, list[AdapterSpec]] = {}  # where each digest was seen, last first
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._queue: OrderedDict[str, _Entry] = OrderedDict()  # fetches that wait for room, oldest first
        self._failures: dict[str, _Failure] = {}
        self._hung: dict[str, _Read] = {}  # given up, and their threads still hang
        self._bytes = 0
        self._closed = False
        self._hits = self._loads = self._num_failures = self._evictions = 0
        self._prefetches: set[str] = set()  # that wait for their thread
        self._files = OpenFiles(limit_s=read_timeout_s)
        self._readers = BackgroundThreads(_NUM_READERS, "lorafleet-adapter")
        self._prefetcher = BackgroundThreads(1, "lorafleet-prefetch")

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
            self._hung.pop(spec.digest, None)

    def forget(self, digest: str) -> int:
        """Take an adapter that nobody holds out of the store; the bytes of host memory that this freed."""
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
        """Let a registered adapter be readable until `release_files`, though its files be replaced or deleted.

        From when the future is done.
        """
        with self._lock:
            specs = tuple(self._specs.get(digest, ()))
        return self._files.hold(digest, specs)

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
                read = _Read(digest)
                self._prefetcher.submit(
                    partial(self._read_ahead, read), limit_s=self._limit_s(digest), done=partial(self._take, read)
                )

    def release(self, digest: str) -> None:
        """Give back what one successful `fetch` handed out."""
        with self._lock:
            self._entries[digest].holders -= 1
            self._admit()

    def resident(self) -> tuple[str, ...]:
        """Loaded adapters, least recently used first."""
        with self._lock:
            return tuple(digest for digest, entry in self._entries.items() if entry.future.done())

    @property
    def num_reading(self) -> int:
        """Adapters that are read now, or wait to be."""
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
                    self._bytes / (self._max_bytes or math.inf),  # without LoRA there is no room, and nothing in it
                    len(self._entries) / (self._max_adapters or math.inf),
                ),
                hits=self._hits,
                loads=self._loads,
                failures=self._num_failures,
                evictions=self._evictions,
            )

    def close(self, wait_s: float = CLOSE_S) -> None:
        """Let running reads end, for so long at most, stop the threads; all other fetches fail."""
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
        others_go = any(entry.holders for entry in self._entries.values())  # soon: whoever holds one gives it back
        for digest in sorted(spare, key=self._need_of):  # stable
            if self._fits(num_bytes) or (others_go and self._need_of(digest) > 1):
                break
            self._evict(digest)
        return self._fits(num_bytes)

    def _make_room_ahead(self, num_bytes: int) -> bool:
        """Room for a prefetch: only at the cost of what no prefetch brought, and only if that is enough."""
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
        """Whether there is room beside what is cached, `but` for some."""
        num_cached = len(self._entries) - len(but)
        cached_bytes = self._bytes - sum(self._entries[digest].num_bytes for digest in but)
        few = self._max_adapters is None or num_cached < self._max_adapters
        return few and cached_bytes + num_bytes <= self._max_bytes

    def _evict(self, digest: str) -> None:
        self._eviction.evict(digest)
        self._bytes -= self._entries.pop(digest).num_bytes
        self._evictions += 1

    def _read_ahead(self, read: _Read) -> HostAdapter | None:
        """On the prefetching thread."""
        digest = read.digest
        with self._lock:
            self._prefetches.discard(digest)
            # Whoever waits for room comes first; that includes a fetch of this very adapter.
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
        """On a thread that may hang in it."""
        read.began = self._clock()
        try:
            return self._load_first(read.specs)
        finally:
            with self._lock:
                read.has_ended = True
                if self._hung.get(read.digest) is read:
                    del self._hung[read.digest]

    def _limit_s(self, digest: str) -> float:
        """The lock is held."""
        specs = self._specs.get(digest)
        return self._read_timeout_s + (0 if specs is None else self._size(specs[0]) / _LEAST_BYTES_A_S)

    def _recent_failure(self, digest: str) -> LoRAFleetError | None:
        """The error of a failed load that is not to be tried again yet."""
        failure = self._failures.get(digest)
        if failure is None or (self._clock() >= failure.retry_at and digest not in self._hung):
            return None
        return failure.error

    def _take(self, read: _Read, reading: Future[HostAdapter] | Future[HostAdapter | None]) -> None:
        """Book what came of a read, and tell those who wait for it."""
        digest, entry, caught = read.digest, read.entry, reading.exception()
        if entry is None:  # a prefetch that came to nothing
            with self._lock:
                self._prefetches.discard(digest)
            self._has_read()
            return
        if caught is not None:
            error = (
                caught if isinstance(caught, LoRAFleetError) else InternalError(f"Reading an adapter failed: {caught}")
            )
            with self._lock:
                is_hung = not read.has_ended and digest in self._specs
                if is_hung:
                    logger.warning("reading adapter %s from %s hangs", digest, read.specs[0].path)
                    self._hung[digest] = read
                if entry.holders or is_hung:  # else it was only a hint: a fetch shall look again
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
