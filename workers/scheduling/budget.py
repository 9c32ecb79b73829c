"""The budget of preemption for turns: at most `SHARE` of all seat time may stand empty for it.

A turn loses work if the adapter that leaves its slot had more requests in the batch than the one that takes it: the
other seats stand empty until it has a slot again, unless requests that need no other slot take them. Tokens that are
computed again are lost too. What was lost is measured, step by step, against what was served. What was not spent is
saved, up to one turn in which every seat is empty. A turn is taken if what it is likely to cost has been saved. Once
more than that was lost, preempted requests come first.

Example: 40 seats are in use for a second. That saves 0.15 * 40 * 1 s = 6 seats times seconds, enough for a turn of 1 s
that leaves 6 seats empty, and not for one that leaves 7. If 10 of the 40 then stand empty for half a second, 5 are
spent and 3 are saved: 4 are left.

The same figures say in how many slots turns can be taken all the time, and so how many adapters may wait (turns.py).
With eight slots of eight requests each, and waiting adapters with one request each, a turn leaves 7 seats empty:
0.15 * 64 / 7 = 1.4, so in one slot.

Pure: times are the caller's.
"""

from __future__ import annotations

SHARE = 0.15  # less than the fifth that is promised, since costs are estimates
_REMEMBERS = 4.0  # turns
_MIN_PLACES = 0.125  # turns go on at an eighth of the rate of one slot, whatever was measured


class TurnBudget:
    """An account of seats that stand empty, times seconds."""

    def __init__(self, num_seats: int, turn_s: float) -> None:
        self._turn_s = turn_s
        self._max_saved = num_seats * turn_s
        self._saved = 0.0
        self._booked_at: float | None = None
        self._served = 0.0  # mean number of seats that are in use or lost
        self._cost = 0.0  # seats that a turn would leave empty; falls slowly
        self._redone = 0.0  # since the last turn was taken
        self._redone_a_turn = 0.0  # mean

    @property
    def is_overdrawn(self) -> bool:
        return self._saved < 0

    def book(self, now: float, *, num_running: int, num_lost: int, redone: float, cost: float) -> None:
        """Book the time since the last call.

        num_lost: seats that stand empty for preempted requests. redone: the share of the time that went into tokens
        they had computed before. cost: how many more seats another turn would leave empty.
        """
        seconds = 0.0 if self._booked_at is None else now - self._booked_at
        self._booked_at = now
        num_served = num_running + num_lost
        num_redone = redone * num_running
        self._redone += seconds * num_redone
        self._saved = min(self._max_saved, self._saved + seconds * (SHARE * num_served - num_lost - num_redone))
        weight = min(1.0, seconds / (_REMEMBERS * self._turn_s))
        if not num_served:  # an engine without requests: turns in it cost nothing, whatever they did before
            self._served = self._cost = self._redone_a_turn = 0.0
        elif not self._served:
            self._served = num_served
        self._served += weight * (num_served - self._served)
        self._cost = max(cost, self._cost + weight * (cost - self._cost))

    def take(self) -> None:
        """Book that a turn begins."""
        self._redone_a_turn += (self._redone - self._redone_a_turn) / _REMEMBERS
        self._redone = 0.0

    def allows(self, num_lost: float, num_more: float) -> bool:
        """Return whether a turn may be taken that leaves `num_more` more seats empty."""
        if num_more <= 0:
            return num_more < 0 or not self.is_overdrawn
        return (num_lost + num_more) * self._turn_s <= self._saved

    def places(self, num_places: int) -> float:
        """Return in how many of these slots turns can be taken all the time; below 1: in one, for that part of it."""
        cost = self._cost + self._redone_a_turn / self._turn_s
        if SHARE * self._served >= num_places * cost:
            return num_places
        return max(_MIN_PLACES, SHARE * self._served / cost)  # before anything is served there is no figure to go by
