"""The current meaning of each adapter's name, as far as known: its newest version, or that it is unloaded.

Controller, workers and gateways each keep this, so that one which lost its memory recovers it from the others. Messages
may come twice, late and in any order; the outcome is the same. Leaves to others: what is loaded where.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lorafleet.proto import worker_pb2

MAX_UNLOADED = 10_000  # remembered names of unloaded adapters; the oldest are dropped first


class AdapterNames:
    """The newest known version of each name. Not thread-safe."""

    def __init__(self, of_start: Collection[str] = ()) -> None:
        """of_start: names that every start loads again. Their unloading is never forgotten."""
        self._of_start = frozenset(of_start)
        self._newest: dict[str, worker_pb2.Adapter] = {}
        self._unloaded: dict[str, None] = {}  # that may be dropped, oldest first

    def note(self, adapters: Iterable[worker_pb2.Adapter]) -> bool:
        """Take over versions newer than the known ones; return whether there were any."""
        changed = False
        for adapter in adapters:
            known = self._newest.get(adapter.name)
            if known is None or _supersedes(adapter, known):
                self._put(adapter)
                changed = True
        return changed

    def get(self, name: str) -> worker_pb2.Adapter | None:
        """Return the newest version of a name; it may be `unloaded`."""
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
    # Two workers have read a start-up adapter. If its files changed in between, the earlier read counts.
    return (adapter.created, adapter.digest) < (known.created, known.digest)
