"""The device slots: which adapter each holds.

Decides only: engine/slot_loader.py moves the weights, model/lora.py holds them.

A slot is empty, loading, or ready. A running request acquires the slots of its adapters and releases them at its end;
an adapter is pinned if a user wants it to stay. The eviction policy orders the ready adapters that may be evicted:
neither pinned nor in use.

Some adapters need memory beside their slot, for an embedding or a head of their own. It is taken from a pool of
`max_bytes` and given back with the slot.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Sequence

from lorafleet.workers.scheduling.eviction import Eviction, LeastRecentlyUsed


class AdapterSlots:
    """`num_slots` device slots, named by adapter digests. The base model uses none."""

    def __init__(
        self,
        num_slots: int,
        *,
        max_bytes: int = 0,
        bytes_of: Callable[[str], int] = lambda _: 0,
        eviction: Eviction | None = None,
    ) -> None:
        """bytes_of: the bytes that an adapter takes from the pool, at most `max_bytes`."""
        self.num_slots = num_slots
        self._max_bytes = max_bytes
        self._bytes_of = bytes_of
        self._eviction = eviction or LeastRecentlyUsed()
        self._bytes: dict[str, int] = {}  # loading and ready adapters → bytes of the pool, > 0
        self._emptied: list[int] = []  # slots emptied since the last `take_emptied`
        self._empty = list(range(num_slots - 1, -1, -1))
        self._loading: dict[str, int] = {}
        self._ready: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._occupants: frozenset[str] | None = None  # None: to be found again
        self._reload_s: dict[str, float] = {}  # ready adapters → how long their load took
        self._uses: dict[str, int] = {}  # ready adapters → running requests, > 0
        self._pinned: set[str] = set()  # never evicted once they are ready
        self.num_changes = 0  # so far, of the occupants and of those that may be evicted

    def slot_of(self, digest: str) -> int | None:
        """Return the slot of a ready adapter, else None."""
        return self._ready.get(digest)

    def is_loading(self, digest: str) -> bool:
        return digest in self._loading

    def loading(self) -> tuple[str, ...]:
        """Return the loading adapters."""
        return tuple(self._loading)

    def resident(self) -> tuple[str, ...]:
        """Return the ready adapters, least recently used first."""
        return tuple(self._ready)

    def occupants(self) -> frozenset[str]:
        """Return the adapters that are loading or ready, as the same object until they change."""
        if self._occupants is None:
            self._occupants = frozenset([*self._loading, *self._ready])
        return self._occupants

    def is_in_use(self, digest: str) -> bool:
        """Return whether running requests use an adapter."""
        return digest in self._uses

    @property
    def num_in_use(self) -> int:
        """Return the number of adapters that running requests use."""
        return len(self._uses)

    @property
    def usual_uses(self) -> float:
        """Return how many running requests use the adapter of a running request, on average."""
        num_uses = sum(self._uses.values())
        return sum(num * num for num in self._uses.values()) / num_uses if num_uses else 0.0

    def obstacles(self, digest: str) -> tuple[str, ...]:
        """Return adapters in use that `digest` could replace if their requests were preempted."""
        return tuple(blocker for blocker in self.blockers(digest) if blocker in self._uses)

    def blockers(self, digest: str) -> list[str]:
        """Return ready adapters, in use or not, that `digest` could replace."""
        lacks_bytes = self.lacks_bytes(digest)
        return [
            ready for ready in self._ready if ready not in self._pinned and (not lacks_bytes or ready in self._bytes)
        ]

    def lacks_bytes(self, digest: str) -> bool:
        """Return whether the pool has too little room for `digest`; several adapters may have to be evicted for it."""
        return self._lacking_bytes(digest) > 0

    def start_load(self, digest: str, keep: Container[str] = ()) -> int | None:
        """Return a slot to load `digest` into, and evict adapters that are idle and not in `keep` if need be.

        None if too few can be evicted. The slot is loading until `finish_load` or `fail_load`.
        """
        assert digest not in self._loading and digest not in self._ready
        victims = self._victims(digest, keep)
        if victims is None:
            return None
        for victim in victims:
            self._eviction.evict(victim)
            self._vacate(victim, self._ready.pop(victim))
        slot = self._empty.pop()
        self._loading[digest] = slot
        self._occupants = None
        self.num_changes += 1
        num_bytes = self._bytes_of(digest)
        if num_bytes:
            self._bytes[digest] = num_bytes
        return slot

    def start_loads(self, digests: Sequence[str], keep: Container[str] = ()) -> list[int] | None:
        """Call `start_load` for all of them or none. If there are several, none takes any of the pool."""
        assert len(digests) == 1 or not any(map(self._bytes_of, digests))
        if len(digests) > 1 and self.num_lacking(len(digests), keep) > 0:
            return None
        slots = [slot for digest in digests if (slot := self.start_load(digest, keep)) is not None]
        return slots or None

    def num_lacking(self, num_slots: int, keep: Container[str] = ()) -> int:
        """Return how many slots must come free before `num_slots` can be had; 0 or less: they can be had now."""
        return num_slots - len(self._empty) - len(self._idle(keep))

    def finish_load(self, digest: str, reload_s: float = 0.0) -> None:
        """Make a loading adapter ready; its load took `reload_s`."""
        self._ready[digest] = self._loading.pop(digest)
        self.num_changes += 1
        self._reload_s[digest] = reload_s
        self._eviction.use(digest, num_bytes=1, reload_s=reload_s)

    def fail_load(self, digest: str) -> None:
        """Empty the slot of a loading adapter."""
        self._vacate(digest, self._loading.pop(digest))

    def drop(self, digest: str) -> int | None:
        """Empty the slot of an adapter that no request uses. Return its bytes of the pool; None: it is not ready."""
        assert digest not in self._uses and digest not in self._loading
        slot = self._ready.pop(digest, None)
        if slot is None:
            return None
        num_bytes = self._bytes.get(digest, 0)
        self._eviction.drop(digest)
        self._vacate(digest, slot)
        return num_bytes

    def take_emptied(self) -> list[int]:
        """Return the slots emptied since the last call, whose adapters' memory in the pool must be freed now."""
        emptied, self._emptied = self._emptied, []
        return emptied

    def pin(self, digest: str, is_pinned: bool) -> None:
        """Set whether an adapter is pinned: from now on it leaves its slot only by `drop`."""
        (self._pinned.add if is_pinned else self._pinned.discard)(digest)
        self.num_changes += 1

    @property
    def num_pinned(self) -> int:
        """Return the number of slots that no other adapter can have."""
        return len(self._pinned)

    def acquire(self, digest: str) -> None:
        """Count one more running request that uses a ready adapter."""
        self._ready.move_to_end(digest)
        self._eviction.use(digest, num_bytes=1, reload_s=self._reload_s[digest])
        self._uses[digest] = self._uses.get(digest, 0) + 1

    def release(self, digest: str) -> None:
        self._uses[digest] -= 1
        if not self._uses[digest]:
            del self._uses[digest]
            self.num_changes += 1

    def _victims(self, digest: str, keep: Container[str]) -> list[str] | None:
        """Return the adapters to evict so that there is room for `digest`; None: no room can be had."""
        lacking = self._lacking_bytes(digest)
        if self._empty and lacking <= 0:
            return []
        idle = self._idle(keep)
        victims: list[str] = []
        if lacking > 0:
            for ready in self._eviction.order(ready for ready in idle if ready in self._bytes):
                victims.append(ready)
                lacking -= self._bytes[ready]
                if lacking <= 0:
                    break
            else:
                return None
        if not victims and not self._empty:
            victims = self._eviction.order(idle)[:1]
        return victims if victims or self._empty else None

    def _idle(self, keep: Container[str]) -> list[str]:
        """Return the ready adapters that may be evicted."""
        return [ready for ready in self._ready if not (ready in self._uses or ready in self._pinned or ready in keep)]

    def _lacking_bytes(self, digest: str) -> int:
        """Return the bytes that the pool lacks for a cold adapter; 0 or less: there is room."""
        num_bytes = self._bytes_of(digest)
        return sum(self._bytes.values()) + num_bytes - self._max_bytes if num_bytes else 0

    def _vacate(self, digest: str, slot: int) -> None:
        self._occupants = None
        self.num_changes += 1
        self._empty.append(slot)
        self._emptied.append(slot)
        self._bytes.pop(digest, None)
        self._reload_s.pop(digest, None)

    def check_integrity(self) -> None:
        """Check that every slot is in exactly one state, and uses belong to ready adapters. For tests."""
        slots = self._empty + list(self._loading.values()) + list(self._ready.values())
        assert sorted(slots) == list(range(self.num_slots)), slots
        assert not self._loading.keys() & self._ready.keys()
        assert self._uses.keys() <= self._ready.keys() == self._reload_s.keys()
        assert all(count > 0 for count in self._uses.values())
        assert self.occupants() == self._loading.keys() | self._ready.keys()
        assert self._bytes.keys() <= self._loading.keys() | self._ready.keys()
        assert sum(self._bytes.values()) <= self._max_bytes
