"""Open files of the adapters that requests use: readable even after they are replaced under their path, or deleted.

This holds for a file replaced by a new one. A writer that overwrites the old file in place destroys it for all.

Files are opened and closed on separate threads, since a file system may hang.
"""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import IO

from lorafleet.workers.adapters.background import CLOSE_S, BackgroundThreads
from lorafleet.workers.adapters.digest import FileStamp
from lorafleet.workers.adapters.format import AdapterSpec
from lorafleet.workers.errors import LoRAFleetError

_SHARE = 0.25  # of this process's file limit; the rest is for connections
_NUM_THREADS = 2


@dataclass(frozen=True, slots=True)
class OpenAdapter:
    spec: AdapterSpec
    files: tuple[IO[bytes], ...]  # in the spec's order


@dataclass(slots=True, eq=False)
class _Held:
    holders: int
    num_files: int  # counted against the limit; until it is open, the expected number
    opened: Future[OpenAdapter | None] = field(default_factory=Future)


class OpenFiles:
    """Open files by digest, counted. Thread-safe; only `close` and `borrow` wait for a file system."""

    def __init__(self, max_files: int | None = None, *, limit_s: float = 30.0) -> None:
        """max_files: by default a share of the process's limit. limit_s: an open that takes longer is abandoned."""
        self._max_files = (
            int(_SHARE * resource.getrlimit(resource.RLIMIT_NOFILE)[0]) if max_files is None else max_files
        )
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._opening: set[str] = set()  # on a thread, wanted or not: one that hangs is not tried twice
        self._num_files = 0
        self._threads = BackgroundThreads(_NUM_THREADS, "lorafleet-open")

    def hold(self, digest: str, specs: Sequence[AdapterSpec]) -> Future[OpenAdapter | None]:
        """Keep the adapter's files open until as many calls of `release`. specs: where it may be, best first.

        The future is done when they are open. Its result is None if no file exists any more or too many are open.
        """
        with self._lock:
            held = self._held.get(digest)
            if held is not None:
                held.holders += 1
                return held.opened
            may_open = self._num_files < self._max_files and digest not in self._opening
            num_files = len(specs[0].files) if specs and may_open else 0
            held = self._held[digest] = _Held(1, num_files)
            self._num_files += num_files
            if num_files:
                self._opening.add(digest)
        if not num_files:
            held.opened.set_result(None)
            return held.opened
        self._threads.submit(
            partial(self._open, digest, specs),
            limit_s=self._limit_s,
            what="Opening the adapter's files",
            done=partial(self._take, digest, held),
            drop=_close,
        )
        return held.opened

    def release(self, digest: str) -> None:
        with self._lock:
            held = self._held[digest]
            held.holders -= 1
            if held.holders:
                return
            del self._held[digest]
            self._num_files -= held.num_files
        if held.opened.done() and (adapter := held.opened.result()) is not None:
            self._threads.submit(partial(_close, adapter))

    @contextmanager
    def borrow(self, digest: str) -> Iterator[OpenAdapter | None]:
        """Yield the open files, valid inside the with statement; None if not held. Waits until they are open."""
        with self._lock:
            held = self._held.get(digest)
            if held is not None:
                held.holders += 1
        try:
            yield None if held is None else held.opened.result()
        finally:
            if held is not None:
                self.release(digest)

    def close(self, wait_s: float = CLOSE_S) -> None:
        """Close everything within `wait_s`. The caller ensures that no read is in progress."""
        with self._lock:
            held = list(self._held.values())
            self._held.clear()
            self._num_files = 0
        for entry in held:
            if entry.opened.done() and (adapter := entry.opened.result()) is not None:
                self._threads.submit(partial(_close, adapter))
        self._threads.close(wait_s, drops=False)

    def num_files(self) -> int:
        with self._lock:
            return self._num_files

    def _open(self, digest: str, specs: Sequence[AdapterSpec]) -> OpenAdapter | None:
        try:
            return _open_first(specs)
        finally:
            with self._lock:
                self._opening.discard(digest)

    def _take(self, digest: str, held: _Held, opening: Future[OpenAdapter | None]) -> None:
        """Record the outcome of an open. Runs on a thread of the pool."""
        try:
            adapter = opening.result()
        except (LoRAFleetError, OSError):
            adapter = None
        with self._lock:
            is_wanted = self._held.get(digest) is held
            if is_wanted:
                self._num_files += _num_files(adapter) - held.num_files
                held.num_files = _num_files(adapter)
            held.opened.set_result(adapter if is_wanted else None)
        if not is_wanted:
            _close(adapter)


def _open_first(specs: Sequence[AdapterSpec]) -> OpenAdapter | None:
    for spec in specs:
        with ExitStack() as opened:
            try:
                files = tuple(opened.enter_context(spec.folder.open(file.name)) for file in spec.files)
                stamps = tuple(FileStamp.of(file) for file in files)
            except OSError:
                continue
            if all(known.stamp in (None, stamp) for known, stamp in zip(spec.files, stamps, strict=True)):
                opened.pop_all()
                return OpenAdapter(spec, files)
    return None


def _num_files(adapter: OpenAdapter | None) -> int:
    return 0 if adapter is None else len(adapter.files)


def _close(adapter: OpenAdapter | None) -> None:
    for file in () if adapter is None else adapter.files:
        file.close()
