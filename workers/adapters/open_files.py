"""The files of adapters that requests name, kept open: replaced under their path, or deleted, they can be read still.

It takes a file that is put in the place of the old one. Whoever writes into the old one itself destroys it for all.
"""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO

from lorafleet.workers.adapters.digest import FileStamp
from lorafleet.workers.adapters.format import AdapterSpec

_SHARE = 0.25  # of the files that this process may have open; the rest is for connections


@dataclass(frozen=True, slots=True)
class OpenAdapter:
    spec: AdapterSpec
    files: tuple[IO[bytes], ...]  # as the spec lists them


@dataclass(slots=True)
class _Held:
    adapter: OpenAdapter | None  # None: no file was there any more, or too many are open
    holders: int


class OpenFiles:
    """By digest, counted. Thread-safe."""

    def __init__(self, max_files: int | None = None) -> None:
        """max_files: by default a share of what the process may open."""
        self._max_files = (
            int(_SHARE * resource.getrlimit(resource.RLIMIT_NOFILE)[0]) if max_files is None else max_files
        )
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._num_files = 0

    def hold(self, digest: str, specs: Sequence[AdapterSpec]) -> None:
        """Keep the adapter's files open until as many calls of `release`. specs: where it may lie, best first."""
        with self._lock:
            held = self._held.get(digest)
            if held is not None:
                held.holders += 1
                return
            may_open = self._num_files < self._max_files
        adapter = _open_first(specs) if may_open else None  # without the lock: a file system may be slow
        with self._lock:
            held = self._held.get(digest)
            if held is None:
                self._held[digest] = _Held(adapter, 1)
                self._num_files += _num_files(adapter)
                return
            held.holders += 1
        _close(adapter)

    def release(self, digest: str) -> None:
        with self._lock:
            held = self._held[digest]
            held.holders -= 1
            if held.holders:
                return
            del self._held[digest]
            self._num_files -= _num_files(held.adapter)
        _close(held.adapter)

    @contextmanager
    def borrow(self, digest: str) -> Iterator[OpenAdapter | None]:
        """The open files, which stay so inside the with statement; None where none are."""
        with self._lock:
            held = self._held.get(digest)
            if held is not None:
                held.holders += 1
        try:
            yield None if held is None else held.adapter
        finally:
            if held is not None:
                self.release(digest)

    def close(self) -> None:
        """Close everything. Nobody reads any more."""
        with self._lock:
            held = list(self._held.values())
        for entry in held:
            _close(entry.adapter)

    def num_files(self) -> int:
        with self._lock:
            return self._num_files


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
