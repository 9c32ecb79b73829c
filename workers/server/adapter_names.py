"""What each adapter's name stands for, as far as somebody was told: the newest version of it, or nothing any more.

Controller, workers and gateways each keep this, so that one which has lost its memory has it back from the others. What
is told may come twice, late and in any order; the outcome is the same. Leaves to others: what is loaded where.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lorafleet.proto import worker_pb2

MAX_UNLOADED = 10_000  # names of unloaded adapters that are remembered; the oldest are forgotten first


class AdapterNames:
    """`note` what is known. Not thread-safe."""

    def __init__(self, of_start: Collection[str] = ()) -> None:
        """of_start: names that every start loads again. That one was unloaded is never forgotten."""
        self._of_start = frozenset(of_start)
        self._newest: dict[str, worker_pb2.Adapter] = {}
        self._unloaded: dict[str, None] = {}  # that may be forgotten, oldest first

    def note(self, adapters: Iterable[worker_pb2.Adapter]) -> bool:
        """Take what is newer than what is known; whether anything was."""
        changed = False
        for adapter in adapters:
            known = self._newest.get(adapter.name)
            if known is None or _supersedes(adapter, known):
                self._put(adapter)
                changed = True
        return changed

    def get(self, name: str) -> worker_pb2.Adapter | None:
        """The newest version of a name; it may be `unloaded`."""
        return self._newest.get(name)

    def all(self) -> list[worker_pb2.Adapter]:
        return list(self._newest.values())

    def loaded(self) -> list[worker_pb2.Adapter]:
        return [adapter for adapter in self._newest.values() if not adapter.unloaded]

    def _put(self, adapter: worker_pb2.Adapter) -> None:
        self._newest[adapter.name] = adapter
        self._unloaded.pop(adapter.name, None)
        if adapter.unloaded and adapter.name not in self._of_start:
            self._unloaded[adapter.name] = None
            if len(self._unloaded) > MAX_UNLOADED:
                oldest = next(iter(self._unloaded))
                del self._unloaded[oldest], self._newest[oldest]


def _supersedes(adapter: worker_pb2.Adapter, known: worker_pb2.Adapter) -> bool:
    if adapter.version != known.version:
        return adapter.version > known.version
    # Two workers have read an adapter of the start-up; should its files have changed between, the first one's served.
    return (adapter.created, adapter.digest) < (known.created, known.digest)
