"""The bound on waiting: who must have a turn now, and how many may wait so that all get theirs in time.

Places (adapter slots, or seats in the batch) are handed on in turns of q seconds: whoever holds a place gives it up for
one whose time is running out, but not before it has held it for q. With S places, a line served longest wait first, and
the time to the first token (the adapter's load, the prompt) within q, the k-th in line, k from 0, has its first token
at most (k // S + 2) * q from now: up to q until the present holders have had their turn, k // S turns of those before
it, and its own. So with B the bound, turns must be given once somebody has waited for B - (k // S + 2) * q, and of
those who wait at most S * (B / q - 2) can all be served in time. Until then places change hands by themselves.

Pure: times are the caller's.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

from lorafleet.workers.errors import QueueFullError

TURN_S = 1.0

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, slots=True)
class WaitBound:
    """The promise, and the places that it is kept with."""

    max_wait_s: float  # 0: no promise
    num_slots: int  # for adapters
    num_seats: int  # for clients: a tenant's requests for one adapter, or for the base model

    @property
    def turn_s(self) -> float:
        """How long a place is kept at least."""
        return min(TURN_S, self.max_wait_s / 4) if self.max_wait_s else TURN_S

    @property
    def num_adapter_places(self) -> int:
        return min(self.num_slots, self.num_seats)

    @property
    def max_adapters(self) -> int:
        """How many adapters may wait for a slot."""
        return self.num_adapter_places * int(self.max_wait_s / self.turn_s - 2)

    @property
    def max_clients(self) -> int:
        """How many clients may wait for a seat; a turn less, for those that lose theirs with their adapter's slot."""
        return self.num_seats * int(self.max_wait_s / self.turn_s - 3)


class Line(Generic[T]):
    """Those that wait for one kind of place, longest wait first."""

    def __init__(self, num_places: int, bound: WaitBound) -> None:
        self._num_places = num_places
        self._bound = bound
        self._numbers = count()
        self._entries: list[tuple[float, int, T]] = []  # (since when, number, item), sorted
        self._known: dict[T, tuple[float, int, T]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: T) -> bool:
        return item in self._known

    def since(self, item: T) -> float:
        """When an item that is in line began to wait."""
        return self._known[item][0]

    def add(self, item: T, since: float) -> None:
        """Put an item in line; one that is in line keeps its place."""
        if item not in self._known:
            entry = self._known[item] = (since, next(self._numbers), item)
            insort(self._entries, entry)

    def discard(self, item: T) -> None:
        entry = self._known.pop(item, None)
        if entry is not None:
            del self._entries[bisect_left(self._entries, entry[:2], key=lambda known: known[:2])]

    def due(self, now: float) -> list[T]:
        """Those that must have a place now, longest wait first, at most as many as there are places."""
        places, turn_s = self._num_places, self._bound.turn_s
        if not self._bound.max_wait_s or not self._entries:
            return []
        latest = now - self._bound.max_wait_s + 2 * turn_s  # whoever has waited since then is due at the line's head
        head = self._entries[:places]
        for turn, k in enumerate(range(places, len(self._entries), places), start=1):
            if self._entries[k][0] <= latest + turn * turn_s:
                return [item for _, _, item in head]
        return [item for since, _, item in head if since <= latest]

    def check_integrity(self) -> None:
        """For tests."""
        assert self._entries == sorted(self._known.values(), key=lambda entry: entry[:2])


class Entrance:
    """Where requests come in: counts clients with unfinished ones, refuses those that could not be served in time."""

    def __init__(self, bound: WaitBound) -> None:
        self._bound = bound
        self._clients: Counter[tuple[str, str | None]] = Counter()  # unfinished requests by (tenant, adapter)
        self._adapters: Counter[str] = Counter()
        # Of these, those that had running requests after the last step. The owner sets them.
        self.num_served_clients = 0
        self.num_served_adapters = 0

    @property
    def num_waiting_adapters(self) -> int:
        return max(0, len(self._adapters) - self.num_served_adapters)

    @property
    def num_waiting_clients(self) -> int:
        return max(0, len(self._clients) - self.num_served_clients)

    def enter(self, tenant: str, adapter: str | None) -> None:
        """Count one more request. Raises `QueueFullError`: too many others wait for this one to be served in time."""
        bound = self._bound
        if bound.max_wait_s:
            if (
                adapter is not None
                and adapter not in self._adapters
                and self.num_waiting_adapters >= bound.max_adapters
            ):
                raise QueueFullError(
                    f"{self.num_waiting_adapters} adapters wait for one of {bound.num_adapter_places} places; "
                    f"--max-adapter-wait-s {bound.max_wait_s:g} can be kept for {bound.max_adapters}. Try again later; "
                    "a larger --max-adapter-wait-s or --max-loras lets more wait."
                )
            if (tenant, adapter) not in self._clients and self.num_waiting_clients >= bound.max_clients:
                raise QueueFullError(
                    f"{self.num_waiting_clients} clients (a tenant's requests for one model) wait for one of "
                    f"{bound.num_seats} places; --max-adapter-wait-s {bound.max_wait_s:g} can be kept for "
                    f"{bound.max_clients}. Try again later; a larger --max-adapter-wait-s or --max-num-seqs lets more "
                    "wait."
                )
        self._clients[tenant, adapter] += 1
        if adapter is not None:
            self._adapters[adapter] += 1

    def leave(self, tenant: str, adapter: str | None) -> None:
        """One request that was counted has ended."""
        _count_down(self._clients, (tenant, adapter))
        if adapter is not None:
            _count_down(self._adapters, adapter)


def _count_down(counter: Counter[T], key: T) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
