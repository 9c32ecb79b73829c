"""Which adapter is in which device slot. Decides only: the weights are moved by the loop, model/lora.py holds them.

A slot is empty, loading, or ready; a ready one is pinned by the running requests that use it. Least recently used is
evicted first, and never while pinned or loading.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container


class AdapterSlots:
    """`num_slots` device slots, named by adapter digests. The base model uses none."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
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

    def occupants(self) -> frozenset[str]:
        """Adapters that are ready or being loaded."""
        return frozenset(self._loading.keys() | self._ready.keys())

    def pinned(self) -> tuple[str, ...]:
        return tuple(self._pins)

    def is_pinned(self, digest: str) -> bool:
        return digest in self._pins

    def obstacles(self, digest: str) -> tuple[str, ...]:
        """Pinned adapters that `digest` could be loaded in place of."""
        return self.pinned()

    def start_load(self, digest: str, keep: Container[str] = ()) -> int | None:
        """A slot to load `digest` into, evicting the least recently used adapter, not pinned nor in `keep`, if need be.

        None when there is none to evict. The slot is nobody's until `finish_load` or `fail_load`.
        """
        assert digest not in self._loading and digest not in self._ready
        if not self._empty:
            victim = next((ready for ready in self._ready if ready not in self._pins and ready not in keep), None)
            if victim is None:
                return None
            self._empty.append(self._ready.pop(victim))
        slot = self._empty.pop()
        self._loading[digest] = slot
        return slot

    def finish_load(self, digest: str) -> None:
        self._ready[digest] = self._loading.pop(digest)

    def fail_load(self, digest: str) -> None:
        self._empty.append(self._loading.pop(digest))

    def drop(self, digest: str) -> bool:
        """Empty the slot of an adapter that no request uses; False if it is in none."""
        assert digest not in self._pins and digest not in self._loading
        slot = self._ready.pop(digest, None)
        if slot is None:
            return False
        self._empty.append(slot)
        return True

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
