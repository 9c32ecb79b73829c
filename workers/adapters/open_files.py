"""The files of adapters that requests name, kept open: replaced under their path, or deleted, they can be read still.

It takes a file that is put in the place of the old one. Whoever writes into the old one itself destroys it for all.

Files are opened and closed on threads of its own, since a file system may not answer.
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

_SHARE = 0.25  # of the files that this process may have open; the rest is for connections
_NUM_THREADS = 2


@dataclass(frozen=True, slots=True)
class OpenAdapter:
    spec: AdapterSpec
    files: tuple[IO[bytes], ...]  # as the spec lists them


@dataclass(slots=True, eq=False)
class _Held:
    holders: int
    num_files: int  # that count: expected ones until it is open
    opened: Future[OpenAdapter | None] = field(default_factory=Future)


class OpenFiles:
    """By digest, counted. Thread-safe; no call but `close` and `borrow` waits for a file system."""

    def __init__(self, max_files: int | None = None, *, limit_s: float = 30.0) -> None:
        """max_files: by default a share of what the process may open. limit_s: after which an open is given up."""
        self._max_files = (
            int(_SHARE * resource.getrlimit(resource.RLIMIT_NOFILE)[0]) if max_files is None else max_files
        )
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._opening: set[str] = set()  # on a thread, whoever still wants it: one that hangs is not tried twice
        self._num_files = 0
        self._threads = BackgroundThreads(_NUM_THREADS, "lorafleet-open")

    def hold(self, digest: str, specs: Sequence[AdapterSpec]) -> Future[OpenAdapter | None]:
        """Keep the adapter's files open until as many calls of `release`. specs: where it may lie, best first.

        The future is done when they are open. Its result is None where no file was there any more, or too many are
        open.
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
        """The open files, which stay so inside the with statement; None where none are. Waits until they are open."""
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
        """Close everything, for so long at most. Nobody reads any more."""
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
        """They are open, or will not be. On a thread of the pool."""
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
