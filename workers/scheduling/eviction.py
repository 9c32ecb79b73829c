"""Which adapter makes room for another: the same question in the device slots and in the host cache. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

EVICTIONS = ("lru", "cost")


class Eviction(ABC):
    """What is known of the adapters in one tier. Whoever holds them says when one is used and when one goes."""

    @abstractmethod
    def use(self, digest: str, *, num_bytes: int, reload_s: float) -> None:
        """It is used now. It takes `num_bytes` of the tier's room, and getting it again would take `reload_s`."""

    @abstractmethod
    def drop(self, digest: str) -> None:
        """It left the tier without having had to make room."""

    @abstractmethod
    def evict(self, digest: str) -> None:
        """It was chosen to make room."""

    @abstractmethod
    def order(self, digests: Iterable[str]) -> list[str]:
        """`digests`, least recently used first, in the order in which they should go."""


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

    An adapter's priority is L + uses · reload time ÷ bytes, set anew at each use; the lowest goes first, and L becomes
    what it had. So what is small, slow to get, or often used stays longer, and what is not used any more is overtaken.
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
        # Stable: between equals the least recently used goes first.
        return sorted(digests, key=lambda digest: self._priority.get(digest, 0.0))


def make_eviction(name: str) -> Eviction:
    """One of `EVICTIONS`."""
    return {"lru": LeastRecentlyUsed, "cost": GreedyDualSizeFrequency}[name]()
