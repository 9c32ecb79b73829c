"""Eviction policies: which adapter makes room for another, in the device slots and in the host cache alike. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

EVICTIONS = ("lru", "cost")


class Eviction(ABC):
    """An eviction policy and its data on one tier's adapters. The tier reports each use and each removal."""

    @abstractmethod
    def use(self, digest: str, *, num_bytes: int, reload_s: float) -> None:
        """Record a use. The adapter takes `num_bytes` of the tier's room, and reloading it would take `reload_s`."""

    @abstractmethod
    def drop(self, digest: str) -> None:
        """Record that an adapter left the tier without being evicted."""

    @abstractmethod
    def evict(self, digest: str) -> None:
        """Record that an adapter was evicted."""

    @abstractmethod
    def order(self, digests: Iterable[str]) -> list[str]:
        """Return `digests`, given least recently used first, in the order of eviction."""


class LeastRecentlyUsed(Eviction):
    def use(self, digest: str, *, num_bytes: int, reload_s: float) -> None:
        pass

    def drop(self, digest: str) -> None:
        pass

    def evict(self, digest: str) -> None:
        pass

    def order(self, digests: Iterable[str]) -> list[str]:
        return list(digests)


class GreedyDualSizeFrequency(Eviction):
    """Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy", 1998.

    An adapter's priority is L + uses · reload time ÷ bytes, computed at each use; the lowest is evicted, and L becomes
    its priority. So small, slow to reload and often used adapters stay longer, and those no longer used are overtaken.
    """

    def __init__(self) -> None:
        self._floor = 0.0  # L
        self._uses: dict[str, int] = {}
        self._priority: dict[str, float] = {}

    def use(self, digest: str, *, num_bytes: int, reload_s: float) -> None:
        uses = self._uses[digest] = self._uses.get(digest, 0) + 1
        self._priority[digest] = self._floor + uses * reload_s / max(num_bytes, 1)

    def drop(self, digest: str) -> None:
        self._uses.pop(digest, None)
        self._priority.pop(digest, None)

    def evict(self, digest: str) -> None:
        self._floor = max(self._floor, self._priority.get(digest, 0.0))
        self.drop(digest)

    def order(self, digests: Iterable[str]) -> list[str]:
        # The sort is stable: among equals the least recently used goes first.
        return sorted(digests, key=lambda digest: self._priority.get(digest, 0.0))


def make_eviction(name: str) -> Eviction:
    """Return a new policy by its name in `EVICTIONS`."""
    return {"lru": LeastRecentlyUsed, "cost": GreedyDualSizeFrequency}[name]()
