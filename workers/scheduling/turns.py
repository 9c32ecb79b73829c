"""The wait limit: which flows must have a turn now, and how many may wait so that all get theirs in time.

Places (adapter slots, or seats in the batch) are handed on in turns of q seconds: the holder of a place gives it up to
a flow near its wait limit, but not before it has held it for q. Take S places, a line served longest wait first, and
the time to the first token (the adapter's load, the prompt) within q. Then the k-th in line, k from 0, has its first
token at most (k // S + 2) * q from now: up to q for the present holders' turn, k // S turns of those before it, and its
own. So with B the wait limit, turns must begin once the k-th has waited for B - (k // S + 2) * q. Until then places
change hands by themselves.

Example: two slots, B = 10 s, q = 1 s. Three adapters wait since 0 s. The third (k = 2) needs up to (2 // 2 + 2) * 1 = 3
s, so turns begin at 7 s and the first two are due. Were there only two, they would be due at 8 s. At most
2 * (10 / 1 - 4) = 12 turns may wait; a request that would need a 13th is refused.

An adapter's turn serves its share of the seats, so an adapter that more tenants wait for counts as several in line. The
flows that lose a slot with all that ran there are in line again, at its end, with at most 2 * S turns: so of all that
wait at most S * (B / q - 4) can be served in time.

A seat changes hands between two steps. A slot's turn is longer if slots cannot change hands that often: `COST` times as
long as a slot stands empty while an adapter is copied into it, and `READS` times as long as host memory takes to get S
adapters ready. Both are measured (`SlotPace`). And if preemption would leave seats empty, turns are taken in fewer
slots (budget.py). So S and q are what has been measured of late (`SlotTurns`).

The base model needs no slot. It gives up no seat for an adapter's turn while it has no more than its part of the seats
(base_seats.py), and an eighth is left to its flows in any case.

A composition needs the slots of all its adapters at once, k of them: up to k - 1 places before it may be left empty in
a turn. So it counts as 2 * k - 1 in line, whatever slots it shares with others, and the limit holds as before. One case
is weaker: if the slots that are lost served more than 2 * S turns' worth of compositions (many weights of the same few
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

from lorafleet.workers.errors import QueueFullError
from lorafleet.workers.scheduling.shares import RESERVE

TURN_S = 1.0
COST = 5.0  # a turn lasts so many times as long as its slot stands empty at its start
READS = 2.0  # a preempted adapter is read again: slots change hands half as often as adapters can be read
_MAX_PASSED = 8  # turns

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, slots=True)
class WaitBound:
    """The wait limit, and the places it is kept with."""

    max_wait_s: float  # 0: no limit
    num_slots: int  # for adapters
    num_seats: int  # for flows: a tenant's requests for one adapter, or for the base model

    @property
    def turn_s(self) -> float:
        """Return how long a seat is kept at least, and a slot if it can be filled at once."""
        return min(TURN_S, self.max_wait_s / 8) if self.max_wait_s else TURN_S

    @property
    def num_adapter_places(self) -> int:
        return self.places_left(0)

    @property
    def num_flows_a_turn(self) -> int:
        """Return how many flows an adapter's turn serves."""
        return self.num_seats // max(1, self.num_adapter_places)

    def num_turns(self, num_flows: int, num_adapters: int = 1) -> int:
        """Return how many turns an adapter, or a composition of `num_adapters`, needs for so many flows."""
        return -(-num_flows // self.num_flows_a_turn) * (2 * num_adapters - 1)

    def places_left(self, num_pinned: int) -> int:
        """Return the places that adapters can take turns in beside the slots of pinned ones."""
        return min(max(1, self.num_slots - num_pinned), self.num_seats)

    def max_flows(self, num_kept: int = 0) -> int:
        """Return how many flows may wait for a seat while `num_kept` seats are kept for others."""
        return (self.num_seats - num_kept) * int(self.max_wait_s / self.turn_s - 4)


@dataclass(frozen=True, slots=True)
class SlotTurns:
    """The pace at which slots change hands at present."""

    num_places: int  # slots that adapters take turns in
    turn_s: float  # how often each changes hands at most
    hold_s: float  # how long each is kept at least

    def max_turns(self, max_wait_s: float) -> int:
        """Return how many turns may wait: at least two a place, or one a place if it is taken only part of the time."""
        least = 1 if self.turn_s > self.hold_s else 2
        return self.num_places * max(least, int(max_wait_s / self.turn_s - 4))


class SlotPace:
    """Means of the times that slots take to change hands; the newest measurement counts for a quarter."""

    def __init__(self, bound: WaitBound) -> None:
        self._bound = bound
        self._empty_s = 0.0  # how long a slot stands empty while an adapter is loading into it
        self._ready_s = 0.0  # how long the host tier takes for each adapter that gets a slot

    def book(self, empty_s: float | None = None, ready_s: float | None = None) -> None:
        """Book a measurement. ready_s: 0 for an adapter that was in host memory already."""
        if empty_s is not None:
            self._empty_s += (empty_s - self._empty_s) / 4
        if ready_s is not None:
            self._ready_s += (ready_s - self._ready_s) / 4

    @property
    def empty_share(self) -> float:
        """Return the share of a turn in which its slot stands empty."""
        return self._empty_s / self.turns(1).hold_s

    def turns(self, num_places: float) -> SlotTurns:
        """Return the turns in `num_places` slots; below 1: in one slot, for that share of the time."""
        whole = max(1, int(num_places))
        hold_s = max(self._bound.turn_s, COST * self._empty_s, READS * whole * self._ready_s)
        return SlotTurns(whole, hold_s * max(1.0, whole / num_places), hold_s)


class Line(Generic[T]):
    """A line of items that wait for one kind of place, longest wait first."""

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
        self._late_at = math.inf  # when the line's head must have places, or others will be served too late

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: T) -> bool:
        return item in self._known

    @property
    def first_since(self) -> float:
        """Return when the first in line began to wait."""
        return self._entries[0][0] if self._entries else math.inf

    def since(self, item: T) -> float:
        """Return when an item that is in line began to wait."""
        return self._known[item][0]

    def set_turns(self, turns: SlotTurns) -> None:
        """Set how many places there are from now on, and how long each is kept at least."""
        new = turns.num_places, turns.turn_s, turns.hold_s
        if new != (self.num_places, self.turn_s, self.hold_s):
            self.num_places, self.turn_s, self.hold_s = new
            self._is_changed = True

    def put(self, item: T, since: float, num_turns: int = 1, width: int = 1) -> None:
        """Put an item in line, or move it to its place there.

        num_turns: for how many items in line it counts. width: how many places it needs at once.
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
        """Return the time since which an item at the line's head has waited if it must have a place now."""
        return now - self._bound.max_wait_s + 2 * self.hold_s

    def longest(self, before: float) -> Iterator[T]:
        """Iterate over items that wait since `before` or longer, longest first. The line must not change meanwhile."""
        for since, _, item in self._entries:
            if since > before:
                return
            yield item

    def due(self, now: float, can_have: Callable[[T], bool] = lambda _: True) -> list[T]:
        """Return the items that must have a place now, longest wait first, at most as many as there are places.

        can_have: whether an item could have a place now; one that cannot is passed, up to a few turns' worth.
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
        """Return when the line's head must have places, or others will be served too late.

        It is found again at most every sixteenth of a turn: a look at the whole line costs more than all other
        decisions of a step.
        """
        if not self._is_changed or now < self._found_at + self.turn_s / 16:
            return self._late_at
        self._is_changed, self._found_at = False, now
        places, turn_s = self.num_places, self.turn_s
        earliest = math.inf
        k = 0
        for since, _, item in self._entries:
            width = min(self._widths[item], places)
            if k % places + width > places:  # too few places are left in that turn
                k += -k % places
            if k >= places:
                earliest = min(earliest, since - k // places * turn_s)
            k += self._turns[item] - (width - 1)
        self._late_at = earliest + self._bound.max_wait_s - 2 * self.hold_s
        return self._late_at

    def check_integrity(self) -> None:
        """Check that entries, turns and widths agree. For tests."""
        assert self._entries == sorted(self._known.values(), key=lambda entry: entry[:2])
        assert self._turns.keys() == self._widths.keys() == self._known.keys()
        assert self.num_turns == sum(self._turns.values())


class AdmissionControl:
    """Admission control: counts flows with unfinished requests and refuses requests that cannot be served in time."""

    def __init__(self, bound: WaitBound) -> None:
        self._bound = bound
        self._requests: Counter[tuple[str, str | None]] = Counter()  # unfinished requests of each flow
        self._flows: Counter[str] = Counter()  # flows of each adapter
        self._num_turns = 0  # turns that all these flows need
        self._turns_of: Counter[str] = Counter()  # tenants → turns that their flows would need alone
        # The part of this that is served, and so not in line. The owner sets these fields after each step.
        self.num_served_flows = 0
        self.num_served_turns = 0
        self.slot_turns = SlotTurns(bound.num_adapter_places, bound.turn_s, bound.turn_s)
        self.num_base_seats = 0  # seats kept for the base model
        self.hot: frozenset[str] = frozenset()  # adapters that are loading or ready

    @property
    def num_waiting_turns(self) -> int:
        return max(0, self._num_turns - self.num_served_turns)

    @property
    def num_waiting_flows(self) -> int:
        return max(0, len(self._requests) - self.num_served_flows)

    def enter(self, tenant: str, adapter: str | None, num_adapters: int = 1, *, is_hot: bool = False) -> None:
        """Count one more request for an adapter, a composition of `num_adapters`, or the base model.

        is_hot: it needs no other slots than those of `hot`. Raises `QueueFullError` if too many others wait for it to
        be served in time.
        """
        bound = self._bound
        if (tenant, adapter) not in self._requests:
            num_more = 0
            if adapter is not None:
                num_flows = self._flows[adapter]
                num_more = bound.num_turns(num_flows + 1, num_adapters) - bound.num_turns(num_flows, num_adapters)
            if bound.max_wait_s:
                self._check_room(0 if is_hot else num_more, tenant, adapter)
            if adapter is not None:
                self._flows[adapter] += 1
                self._turns_of[tenant] += bound.num_turns(1, num_adapters)
            self._num_turns += num_more
        self._requests[tenant, adapter] += 1

    def leave(self, tenant: str, adapter: str | None, num_adapters: int = 1) -> None:
        """Stop counting a request that has ended."""
        bound = self._bound
        self._requests[tenant, adapter] -= 1
        if self._requests[tenant, adapter]:
            return
        del self._requests[tenant, adapter]
        if not self._requests:  # all slots can be had again, however slowly they changed hands before
            self.slot_turns = SlotTurns(bound.num_adapter_places, bound.turn_s, bound.turn_s)
        if adapter is not None:
            num_flows = self._flows[adapter]
            self._num_turns -= bound.num_turns(num_flows, num_adapters) - bound.num_turns(num_flows - 1, num_adapters)
            self._flows[adapter] -= 1
            if num_flows == 1:
                del self._flows[adapter]
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
        max_flows = bound.max_flows(num_kept)
        if self.num_waiting_flows >= max_flows:
            raise QueueFullError(
                f"{self.num_waiting_flows} flows (a tenant's requests for one model) wait for "
                f"{bound.num_seats - num_kept} seats; --max-adapter-wait-s {bound.max_wait_s:g} can be kept for "
                f"{max_flows}. Try again later; a larger --max-adapter-wait-s or --max-num-seqs lets more wait."
            )

    def max_turns_for(self, tenant: str) -> int:
        """Return how many turns may wait when this tenant asks for one more.

        A tenant that has its share of all turns leaves an eighth to the others: its many adapters, or weights of one
        composition, are no reason to refuse another tenant's first.
        """
        max_turns = self.slot_turns.max_turns(self._bound.max_wait_s)
        reserve = max_turns // RESERVE if tenant else 0
        num_tenants = len(self._turns_of) + (tenant not in self._turns_of)
        has_share = self._turns_of[tenant] >= max(1, (max_turns - reserve) // num_tenants)
        return max_turns - reserve if has_share else max_turns
