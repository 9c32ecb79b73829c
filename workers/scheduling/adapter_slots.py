"""Which adapter is in which device slot. Decides only: the weights are moved by the loop, model/lora.py holds them.

A slot is empty, loading, or ready; a ready one is pinned by the running requests that use it. Who is evicted first is
the eviction policy's to say, and never while pinned or loading, nor one that is to stay resident.

Some adapters need memory beside their slot, for an embedding or a head of their own. It is taken and given back with
the slot, out of a pool of `max_bytes`.
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
        """`bytes_of`: what an adapter takes of the pool, at most `max_bytes`."""
        self.num_slots = num_slots
        self._max_bytes = max_bytes
        self._bytes_of = bytes_of
        self._eviction = eviction or LeastRecentlyUsed()
        self._bytes: dict[str, int] = {}  # of the loading and ready adapters that take some
        self._emptied: list[int] = []  # slots, since the last `take_emptied`
        self._empty = list(range(num_slots - 1, -1, -1))
        self._loading: dict[str, int] = {}
        self._ready: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._occupants: frozenset[str] | None = None  # None: to be found out again
        self._reload_s: dict[str, float] = {}  # of ready ones, what their load took
        self._uses: dict[str, int] = {}  # digest → running requests; only of ready ones, only > 0
        self._pinned: set[str] = set()  # never evicted, once they are in a slot
        self.num_changes = 0  # so far: of what is in the slots, and of who may be evicted

    def slot_of(self, digest: str) -> int | None:
        """The slot of a ready adapter."""
        return self._ready.get(digest)

    def is_loading(self, digest: str) -> bool:
        return digest in self._loading

    def loading(self) -> tuple[str, ...]:
        """Adapters on their way into slots."""
        return tuple(self._loading)

    def resident(self) -> tuple[str, ...]:
        """Ready adapters, least recently used first."""
        return tuple(self._ready)

    def occupants(self) -> frozenset[str]:
        """Adapters that are in slots or on the way there. The same object for as long as they are the same."""
        if self._occupants is None:
            self._occupants = frozenset([*self._loading, *self._ready])
        return self._occupants

    def is_in_use(self, digest: str) -> bool:
        return digest in self._uses

    @property
    def usual_uses(self) -> float:
        """How many running requests the adapter of a running request has, on average."""
        num_uses = sum(self._uses.values())
        return sum(num * num for num in self._uses.values()) / num_uses if num_uses else 0.0

    def obstacles(self, digest: str) -> tuple[str, ...]:
        """Pinned adapters that `digest` could be loaded in place of, if their requests gave way."""
        return tuple(blocker for blocker in self.blockers(digest) if blocker in self._uses)

    def blockers(self, digest: str) -> list[str]:
        """Ready adapters, pinned or not, that `digest` could be loaded in place of."""
        lacks_bytes = self.lacks_bytes(digest)
        return [
            ready for ready in self._ready if ready not in self._pinned and (not lacks_bytes or ready in self._bytes)
        ]

    def lacks_bytes(self, digest: str) -> bool:
        """Whether it is the pool that has too little room for `digest`, for which several may have to go."""
        return self._lacking_bytes(digest) > 0

    def start_load(self, digest: str, keep: Container[str] = ()) -> int | None:
        """A slot to load `digest` into, evicting adapters that are neither pinned nor in `keep`, if need be.

        None when there are too few to evict. The slot is nobody's until `finish_load` or `fail_load`.
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
        """`start_load` of all of them or of none. If there are several, none takes any of the pool."""
        assert len(digests) == 1 or not any(map(self._bytes_of, digests))
        if len(digests) > 1 and self.num_lacking(len(digests), keep) > 0:
            return None
        slots = [slot for digest in digests if (slot := self.start_load(digest, keep)) is not None]
        return slots or None

    def num_lacking(self, num_slots: int, keep: Container[str] = ()) -> int:
        """How many slots must come free before so many can be had; 0 or less: they can be."""
        return num_slots - len(self._empty) - len(self._idle(keep))

    def finish_load(self, digest: str, reload_s: float = 0.0) -> None:
        """The slot holds the adapter now; getting it there took `reload_s`."""
        self._ready[digest] = self._loading.pop(digest)
        self.num_changes += 1
        self._reload_s[digest] = reload_s
        self._eviction.use(digest, num_bytes=1, reload_s=reload_s)

    def fail_load(self, digest: str) -> None:
        self._vacate(digest, self._loading.pop(digest))

    def drop(self, digest: str) -> int | None:
        """Empty the slot of an adapter that no request uses; the bytes of the pool that it had. None: it is in none."""
        assert digest not in self._uses and digest not in self._loading
        slot = self._ready.pop(digest, None)
        if slot is None:
            return None
        num_bytes = self._bytes.get(digest, 0)
        self._eviction.drop(digest)
        self._vacate(digest, slot)
        return num_bytes

    def take_emptied(self) -> list[int]:
        """Slots that were emptied since the last call, whose adapters' memory in the pool is to be freed now."""
        emptied, self._emptied = self._emptied, []
        return emptied

    def pin(self, digest: str, is_pinned: bool) -> None:
        """Whether an adapter, from now on, leaves its slot only by `drop`."""
        (self._pinned.add if is_pinned else self._pinned.discard)(digest)
        self.num_changes += 1

    @property
    def num_pinned(self) -> int:
        """Slots that no other adapter can have."""
        return len(self._pinned)

    def acquire(self, digest: str) -> None:
        """One more running request uses a ready adapter."""
        self._ready.move_to_end(digest)
        self._eviction.use(digest, num_bytes=1, reload_s=self._reload_s[digest])
        self._uses[digest] = self._uses.get(digest, 0) + 1

    def release(self, digest: str) -> None:
        self._uses[digest] -= 1
        if not self._uses[digest]:
            del self._uses[digest]
            self.num_changes += 1

    def _victims(self, digest: str, keep: Container[str]) -> list[str] | None:
        """Who must go so that there is room for `digest`; None: there is no room to be had."""
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
        """Who may be evicted."""
        return [ready for ready in self._ready if not (ready in self._uses or ready in self._pinned or ready in keep)]

    def _lacking_bytes(self, digest: str) -> int:
        """Of the pool, for an adapter that is in no slot; 0 or less: there is room."""
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
        """Every slot is in exactly one state, and uses belong to ready adapters. For tests."""
        slots = self._empty + list(self._loading.values()) + list(self._ready.values())
        assert sorted(slots) == list(range(self.num_slots)), slots
        assert not self._loading.keys() & self._ready.keys()
        assert self._uses.keys() <= self._ready.keys() == self._reload_s.keys()
        assert all(count > 0 for count in self._uses.values())
        assert self.occupants() == self._loading.keys() | self._ready.keys()
        assert self._bytes.keys() <= self._loading.keys() | self._ready.keys()
        assert sum(self._bytes.values()) <= self._max_bytes
