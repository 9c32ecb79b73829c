"""The bound on waiting: who must have a turn now, and how many may wait so that all get theirs in time.

Places (adapter slots, or seats in the batch) are handed on in turns of q seconds: whoever holds a place gives it up for
one whose time is running out, but not before it has held it for q. With S places, a line served longest wait first, and
the time to the first token (the adapter's load, the prompt) within q, the k-th in line, k from 0, has its first token
at most (k // S + 2) * q from now: up to q until the present holders have had their turn, k // S turns of those before
it, and its own. So with B the bound, turns must be given once somebody has waited for B - (k // S + 2) * q. Until then
places change hands by themselves.

An adapter's turn serves its share of the seats, so one that more tenants wait for counts as several in line. Those that
lose a slot with all that ran there are in line again, at its end, with at most 2 * S turns: so of all that wait at most
S * (B / q - 4) can be served in time.

A seat changes hands between two steps. A slot's turn is longer where slots cannot change hands that often: `COST` times
as long as a slot stands empty while an adapter is copied into it, and `AGAIN` times as long as host memory takes to get
S adapters ready. Both are measured (`SlotPace`). And where those that give way would leave seats empty, turns are taken
in fewer slots (budget.py). So S and q are what has been measured of late (`SlotTurns`).

The base model needs no slot. It gives up no seat for an adapter's turn while it has no more than its part of the seats
(base_seats.py), and an eighth is left to its clients in any case.

A composition needs the slots of all its adapters at once, k of them: up to k - 1 places before it may be left empty in
a turn. So it counts as 2 * k - 1 in line, whatever slots it shares with others, and the promise is the same. What is
weaker: when slots are lost that more than 2 * S turns' worth of compositions ran in (many weights of the same few
adapters), those that came after them may wait longer than B.

Pure: times are the caller's.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Generic, TypeVar

from lorafleet.workers.engine.shares import RESERVE
from lorafleet.workers.errors import QueueFullError

TURN_S = 1.0
COST = 5.0  # a turn is so many times as long as its slot stands empty at its beginning
AGAIN = 2.0  # who gives way is read once more, so slots change hands half as often as adapters can be read
_MAX_PASSED = 8  # turns

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, slots=True)
class WaitBound:
    """The promise, and the places that it is kept with."""

    max_wait_s: float  # 0: no promise
    num_slots: int  # for adapters
    num_seats: int  # for clients: a tenant's requests for one adapter, or for the base model

    @property
    def turn_s(self) -> float:
        """How long a seat is kept at least, and a slot if it can be filled at once."""
        return min(TURN_S, self.max_wait_s / 8) if self.max_wait_s else TURN_S

    @property
    def num_adapter_places(self) -> int:
        return self.places_left(0)

    @property
    def num_clients_a_turn(self) -> int:
        """How many clients an adapter's turn serves."""
        return self.num_seats // max(1, self.num_adapter_places)

    def num_turns(self, num_clients: int, num_adapters: int = 1) -> int:
        """How many turns an adapter needs for so many clients, or a composition of `num_adapters`."""
        return -(-num_clients // self.num_clients_a_turn) * (2 * num_adapters - 1)

    def places_left(self, num_pinned: int) -> int:
        """For adapters to take turns in, when some slots change hands no more."""
        return min(max(1, self.num_slots - num_pinned), self.num_seats)

    def max_clients(self, num_kept: int = 0) -> int:
        """How many clients may wait for a seat, when some seats are kept for others."""
        return (self.num_seats - num_kept) * int(self.max_wait_s / self.turn_s - 4)


@dataclass(frozen=True, slots=True)
class SlotTurns:
    """How slots change hands at present."""

    num_places: int  # slots that adapters take turns in
    turn_s: float  # how often each changes hands at most
    hold_s: float  # how long each is kept at least

    def max_turns(self, max_wait_s: float) -> int:
        """How many turns adapters may wait for: two in each place at least, one where that is taken at times only."""
        least = 1 if self.turn_s > self.hold_s else 2
        return self.num_places * max(least, int(max_wait_s / self.turn_s - 4))


class SlotPace:
    """How long slots take to change hands: means of what was measured, the newest counting for a quarter."""

    def __init__(self, bound: WaitBound) -> None:
        self._bound = bound
        self._empty_s = 0.0  # that a slot stands empty while an adapter is on its way into it
        self._ready_s = 0.0  # that the host tier needs for each adapter that gets a slot

    def book(self, empty_s: float | None = None, ready_s: float | None = None) -> None:
        """ready_s: 0 for an adapter that was there already."""
        if empty_s is not None:
            self._empty_s += (empty_s - self._empty_s) / 4
        if ready_s is not None:
            self._ready_s += (ready_s - self._ready_s) / 4

    @property
    def empty_share(self) -> float:
        """The part of a turn in which its slot stands empty."""
        return self._empty_s / self.turns(1).hold_s

    def turns(self, num_places: float) -> SlotTurns:
        """num_places: slots that turns may be taken in; below 1: in one, for so much of the time."""
        whole = max(1, int(num_places))
        hold_s = max(self._bound.turn_s, COST * self._empty_s, AGAIN * whole * self._ready_s)
        return SlotTurns(whole, hold_s * max(1.0, whole / num_places), hold_s)


class Line(Generic[T]):
    """Those that wait for one kind of place, longest wait first."""

    def __init__(self, num_places: int, bound: WaitBound) -> None:
        self._max_places = self.num_places = num_places
        self.turn_s = bound.turn_s  # how often a place changes hands at most
        self.hold_s = bound.turn_s  # how long it is kept at least
        self._bound = bound
        self._numbers = count()
        self._entries: list[tuple[float, int, T]] = []  # (since when, number, item), sorted
        self._known: dict[T, tuple[float, int, T]] = {}
        self._turns: dict[T, int] = {}
        self._widths: dict[T, int] = {}  # places that an item needs at once
        self.num_turns = 0  # of all in line
        self._is_changed = True  # since `_late_at` was found
        self._found_at = -math.inf
        self._late_at = math.inf  # when those at the line's head must have places, or others will be served too late

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: T) -> bool:
        return item in self._known

    @property
    def first_since(self) -> float:
        """When the first in line began to wait."""
        return self._entries[0][0] if self._entries else math.inf

    def since(self, item: T) -> float:
        """When an item that is in line began to wait."""
        return self._known[item][0]

    def set_turns(self, turns: SlotTurns) -> None:
        """Say how many places there are from now on, and how long each is kept at least."""
        new = turns.num_places, turns.turn_s, turns.hold_s
        if new != (self.num_places, self.turn_s, self.hold_s):
            self.num_places, self.turn_s, self.hold_s = new
            self._is_changed = True

    def put(self, item: T, since: float, num_turns: int = 1, width: int = 1) -> None:
        """Put an item in line, or to where it belongs now.

        num_turns: how many places in line it counts for. width: how many places it needs at once.
        """
        old = self._known.get(item)
        if old is None or old[0] != since:
            self.discard(item)
            entry = self._known[item] = (since, next(self._numbers), item)
            insort(self._entries, entry)
        self.num_turns += num_turns - self._turns.get(item, 0)
        self._turns[item] = num_turns
        self._widths[item] = width
        self._is_changed = True

    def discard(self, item: T) -> None:
        entry = self._known.pop(item, None)
        if entry is not None:
            del self._entries[bisect_left(self._entries, entry[:2], key=lambda known: known[:2])]
            self.num_turns -= self._turns.pop(item)
            del self._widths[item]
            self._is_changed = True

    def latest(self, now: float) -> float:
        """Who waits since then must have a place, even at the line's head."""
        return now - self._bound.max_wait_s + 2 * self.hold_s

    def longest(self, before: float) -> Iterator[T]:
        """Those that wait since `before` or longer, longest first. The line must not change meanwhile."""
        for since, _, item in self._entries:
            if since > before:
                return
            yield item

    def due(self, now: float, can_have: Callable[[T], bool] = lambda _: True) -> list[T]:
        """Those that must have a place now, longest wait first, at most as many as there are places.

        can_have: whether one could have a place now; those that cannot are passed, as far as a few turns' worth.
        """
        if not self._bound.max_wait_s or not self._entries:
            return []
        latest = self.latest(now)
        is_late = now >= self._find_late_at(now)
        items = []
        num_left = self._max_places
        for since, _, item in islice(self._entries, _MAX_PASSED * num_left):
            if since > latest and not is_late:
                break
            if not can_have(item):
                continue
            num_left -= min(self._widths[item], self._max_places)
            if num_left < 0:
                break
            items.append(item)
        return items

    def _find_late_at(self, now: float) -> float:
        """As exact as a sixteenth of a turn: a look at all in line costs more than a step decides otherwise."""
        if not self._is_changed or now < self._found_at + self.turn_s / 16:
            return self._late_at
        self._is_changed, self._found_at = False, now
        places, turn_s = self.num_places, self.turn_s
        earliest = math.inf
        k = 0
        for since, _, item in self._entries:
            width = min(self._widths[item], places)
            if k % places + width > places:  # the rest of that turn is too little for it
                k += -k % places
            if k >= places:
                earliest = min(earliest, since - k // places * turn_s)
            k += self._turns[item] - (width - 1)
        self._late_at = earliest + self._bound.max_wait_s - 2 * self.hold_s
        return self._late_at

    def check_integrity(self) -> None:
        """For tests."""
        assert self._entries == sorted(self._known.values(), key=lambda entry: entry[:2])
        assert self._turns.keys() == self._widths.keys() == self._known.keys()
        assert self.num_turns == sum(self._turns.values())


class Entrance:
    """Where requests come in: counts clients with unfinished ones, refuses those that could not be served in time."""

    def __init__(self, bound: WaitBound) -> None:
        self._bound = bound
        self._requests: Counter[tuple[str, str | None]] = Counter()  # unfinished ones of each client
        self._clients: Counter[str] = Counter()  # of each adapter
        self._num_turns = 0  # that all these clients of adapters need
        self._turns_of: Counter[str] = Counter()  # tenants → turns that its clients would need without the others'
        # Of all this, what is not in line since it is served. The owner sets them after each step.
        self.num_served_clients = 0
        self.num_served_turns = 0
        self.slot_turns = SlotTurns(bound.num_adapter_places, bound.turn_s, bound.turn_s)
        self.num_base_seats = 0  # that are kept for the base model
        self.hot: frozenset[str] = frozenset()  # adapters in slots or on the way there

    @property
    def num_waiting_turns(self) -> int:
        return max(0, self._num_turns - self.num_served_turns)

    @property
    def num_waiting_clients(self) -> int:
        return max(0, len(self._requests) - self.num_served_clients)

    def enter(self, tenant: str, adapter: str | None, num_adapters: int = 1, *, is_hot: bool = False) -> None:
        """Count one more request for an adapter, a composition of `num_adapters`, or the base model.

        is_hot: it needs no other slots than those of `hot`. Raises `QueueFullError`: too many others wait for this one
        to be served in time.
        """
        bound = self._bound
        if (tenant, adapter) not in self._requests:
            num_more = 0
            if adapter is not None:
                num_clients = self._clients[adapter]
                num_more = bound.num_turns(num_clients + 1, num_adapters) - bound.num_turns(num_clients, num_adapters)
            if bound.max_wait_s:
                self._check_room(0 if is_hot else num_more, tenant, adapter)
            if adapter is not None:
                self._clients[adapter] += 1
                self._turns_of[tenant] += bound.num_turns(1, num_adapters)
            self._num_turns += num_more
        self._requests[tenant, adapter] += 1

    def leave(self, tenant: str, adapter: str | None, num_adapters: int = 1) -> None:
        """One request that was counted has ended."""
        bound = self._bound
        self._requests[tenant, adapter] -= 1
        if self._requests[tenant, adapter]:
            return
        del self._requests[tenant, adapter]
        if adapter is not None:
            num_clients = self._clients[adapter]
            self._num_turns -= bound.num_turns(num_clients, num_adapters) - bound.num_turns(
                num_clients - 1, num_adapters
            )
            self._clients[adapter] -= 1
            if num_clients == 1:
                del self._clients[adapter]
            self._turns_of[tenant] -= bound.num_turns(1, num_adapters)
            if not self._turns_of[tenant]:
                del self._turns_of[tenant]

    def _check_room(self, num_more_turns: int, tenant: str, adapter: str | None) -> None:
        bound = self._bound
        max_turns = self.max_turns_for(tenant)
        if num_more_turns and self.num_waiting_turns >= max_turns:
            raise QueueFullError(
                f"{self.num_waiting_turns} adapters wait for {self.slot_turns.num_places} slots (one that many tenants "
                f"want counts several times); --max-adapter-wait-s {bound.max_wait_s:g} can be kept for {max_turns}. "
                "Try again later; a larger --max-adapter-wait-s or --max-loras lets more wait."
            )
        num_kept = 0 if adapter is None else max(self.num_base_seats, bound.num_seats // RESERVE)
        max_clients = bound.max_clients(num_kept)
        if self.num_waiting_clients >= max_clients:
            raise QueueFullError(
                f"{self.num_waiting_clients} clients (a tenant's requests for one model) wait for "
                f"{bound.num_seats - num_kept} seats; --max-adapter-wait-s {bound.max_wait_s:g} can be kept for "
                f"{max_clients}. Try again later; a larger --max-adapter-wait-s or --max-num-seqs lets more wait."
            )

    def max_turns_for(self, tenant: str) -> int:
        """How many turns adapters may wait for when this tenant asks for one more.

        A tenant that has its share of all turns leaves an eighth to those that have not: many adapters, or weights of
        one, are no reason to refuse another's first.
        """
        max_turns = self.slot_turns.max_turns(self._bound.max_wait_s)
        reserve = max_turns // RESERVE if tenant else 0
        num_tenants = len(self._turns_of) + (tenant not in self._turns_of)
        has_share = self._turns_of[tenant] >= max(1, (max_turns - reserve) // num_tenants)
        return max_turns - reserve if has_share else max_turns
