"""Which adapter is in which device slot. Decides only: the weights are moved by the loop, model/lora.py holds them.

A slot is empty, loading, or ready; a ready one is pinned by the running requests that use it. Least recently used is
evicted first, and never while pinned or loading.

Some adapters need memory beside their slot, for an embedding or a head of their own. It is taken and given back with
the slot, out of a pool of `max_bytes`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection


class AdapterSlots:
    """`num_slots` device slots, named by adapter digests. The base model uses none."""

    def __init__(self, num_slots: int, *, max_bytes: int = 0, bytes_of: Callable[[str], int] = lambda _: 0) -> None:
        """`bytes_of`: what an adapter takes of the pool, at most `max_bytes`."""
        self.num_slots = num_slots
        self._max_bytes = max_bytes
        self._bytes_of = bytes_of
        self._bytes: dict[str, int] = {}  # of the loading and ready adapters that take some
        self._emptied: list[int] = []  # slots, since the last `take_emptied`
        self._empty = list(range(num_slots - 1, -1, -1))
        self._loading: dict[str, int] = {}
        self._ready: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._pins: dict[str, int] = {}  # digest → running requests; only of ready ones, only > 0

    def slot_of(self, digest: str) -> int | None:
        """The slot of a ready adapter."""
        return self._ready.get(digest)

    def is_loading(self, digest: str) -> bool:
        return digest in self._loading

    def resident(self) -> tuple[str, ...]:
        """Ready adapters, least recently used first."""
        return tuple(self._ready)

    def pinned(self) -> tuple[str, ...]:
        return tuple(self._pins)

    def start_load(self, digest: str) -> int | None:
        """A slot to load `digest` into, evicting the least recently used unpinned adapters if need be.

        None when every slot is pinned or loading, or the pool is taken by such. The slot is nobody's until
        `finish_load` or `fail_load`.
        """
        assert digest not in self._loading and digest not in self._ready
        num_bytes = self._bytes_of(digest)
        lacking = self._lacking_bytes(num_bytes)
        victims = []
        for ready in self._ready:
            if lacking > 0 and ready in self._bytes and ready not in self._pins:
                victims.append(ready)
                lacking -= self._bytes[ready]
        if lacking > 0:
            return None
        if not self._empty and not victims:
            victims = [ready for ready in self._ready if ready not in self._pins][:1]
            if not victims:
                return None
        for victim in victims:
            self._vacate(victim, self._ready.pop(victim))
        slot = self._empty.pop()
        self._loading[digest] = slot
        if num_bytes:
            self._bytes[digest] = num_bytes
        return slot

    def finish_load(self, digest: str) -> None:
        self._ready[digest] = self._loading.pop(digest)

    def fail_load(self, digest: str) -> None:
        self._vacate(digest, self._loading.pop(digest))

    def take_emptied(self) -> list[int]:
        """Slots that were emptied since the last call, whose adapters' memory in the pool is to be freed now."""
        emptied, self._emptied = self._emptied, []
        return emptied

    def in_the_way(self, digest: str, soonest: Callable[[str], int], but: Collection[str]) -> list[str]:
        """The ready adapters, `but` for some, that must go so that `digest` can have a slot: those that go soonest.

        `soonest` orders pinned ones. Fewer than that while others are loading.
        """
        lacking = self._lacking_bytes(self._bytes_of(digest))
        if lacking <= 0:
            pinned = [ready for ready in self._pins if ready not in but]
            return [min(pinned, key=soonest)] if pinned else []
        chosen = []
        holders = [ready for ready in self._ready if ready in self._bytes and ready not in but]
        for ready in sorted(holders, key=lambda ready: soonest(ready) if ready in self._pins else 0):
            if lacking > 0:
                chosen.append(ready)
                lacking -= self._bytes[ready]
        return chosen

    def _lacking_bytes(self, num_bytes: int) -> int:
        """Of the pool, for an adapter that takes so many; 0 or less: there is room."""
        return sum(self._bytes.values()) + num_bytes - self._max_bytes if num_bytes else 0

    def _vacate(self, digest: str, slot: int) -> None:
        self._empty.append(slot)
        self._emptied.append(slot)
        self._bytes.pop(digest, None)

    def pin(self, digest: str) -> None:
        """One more running request uses a ready adapter."""
        self._ready.move_to_end(digest)
        self._pins[digest] = self._pins.get(digest, 0) + 1

    def unpin(self, digest: str) -> None:
        self._pins[digest] -= 1
        if not self._pins[digest]:
            del self._pins[digest]

    def check_integrity(self) -> None:
        """Every slot is in exactly one state, and pins belong to ready adapters. For tests."""
        slots = self._empty + list(self._loading.values()) + list(self._ready.values())
        assert sorted(slots) == list(range(self.num_slots)), slots
        assert not self._loading.keys() & self._ready.keys()
        assert self._pins.keys() <= self._ready.keys()
        assert all(count > 0 for count in self._pins.values())
        assert self._bytes.keys() <= self._loading.keys() | self._ready.keys()
        assert sum(self._bytes.values()) <= self._max_bytes
