"""The first of many items, by a key that grows while they wait: a heap that is corrected when it is read.

Keys may grow at any time without notice (a service counter does, with every token). After one falls, call `push`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from typing import Any, Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Ranking(Generic[T]):
    """A set of items ordered by `key`, whose values compare; among equals the one pushed earlier is first."""

    def __init__(self, key: Callable[[T], Any]) -> None:
        self._key = key
        self._numbers = count()
        # (key when last looked at, number, item). An entry is valid if `_entries` has it; others are dropped on sight.
        self._heap: list[tuple[Any, int, T]] = []
        self._entries: dict[T, tuple[Any, int, T]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        """Iterate in no particular order."""
        return iter(self._entries)

    def __contains__(self, item: T) -> bool:
        return item in self._entries

    def push(self, item: T) -> None:
        """Insert an item, or update one whose key has fallen."""
        key = self._key(item)
        old = self._entries.get(item)
        if old is not None and old[0] <= key:
            return
        entry = self._entries[item] = (key, next(self._numbers) if old is None else old[1], item)
        heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = list(self._entries.values())
            heapify(self._heap)

    def discard(self, item: T) -> None:
        self._entries.pop(item, None)

    def first(self) -> T | None:
        """Return the item with the least key."""
        heap = self._heap
        while heap:
            entry = heap[0]
            key, number, item = entry
            if self._entries.get(item) is not entry:
                heappop(heap)
                continue
            now = self._key(item)
            if now == key:
                return item
            assert now > key, "a key fell without a push"
            entry = self._entries[item] = (now, number, item)
            heapreplace(heap, entry)
        return None

    def take(self, num_items: int) -> list[T]:
        """Return the first `num_items`, in order, without removing them."""
        entries: list[tuple[Any, int, T]] = []
        while len(entries) < num_items and self.first() is not None:
            entries.append(heappop(self._heap))
        for entry in entries:
            heappush(self._heap, entry)
        return [item for _, _, item in entries]

    def check_integrity(self) -> None:
        """Check that every item has an entry in the heap that is no larger than its key. For tests."""
        live = [entry for entry in self._heap if self._entries.get(entry[2]) is entry]
        assert len(live) == len(self._entries)
        assert all(entry[0] <= self._key(entry[2]) for entry in live)
