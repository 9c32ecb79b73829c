"""What turns may cost that requests give way for: of all seat time at most `SHARE` stands empty for them.

A turn is lost work where the adapter that gives way had more requests in the batch than the one that comes: the seats
of the others stay empty until it has its slot back, unless requests that need no other slot take them. So does all that
is computed a second time. What was lost is measured, step by step, against what was served; what was not used is saved
up for a turn in which every seat is empty. A turn is taken if what it is likely to cost has been saved up, and once
more was lost, who gave way goes first.

From the same figures follows in how many slots turns can be taken all the time, which is how many adapters may wait
(turns.py): with eight slots of eight requests each, and adapters of one request that wait, in one.

Pure: times are the caller's.
"""

from __future__ import annotations

SHARE = 0.15  # a fifth is promised; what is estimated may be wrong
_REMEMBERS = 4.0  # turns


class TurnBudget:
    """Seats that stand empty, times seconds."""

    def __init__(self, num_seats: int, turn_s: float) -> None:
        self._turn_s = turn_s
        self._max_saved = num_seats * turn_s
        self._saved = 0.0
        self._booked_at: float | None = None
        self._served = 0.0  # mean of seats that are in use or lost
        self._cost = 0.0  # seats that a turn would leave empty; falls slowly
        self._redone = 0.0  # since the last turn was taken
        self._redone_a_turn = 0.0  # mean

    @property
    def is_overdrawn(self) -> bool:
        return self._saved < 0

    def book(self, now: float, *, num_running: int, num_lost: int, redone: float, cost: float) -> None:
        """How things have been since the last call.

        num_lost: seats that stand empty for those that gave way. redone: the part of the time that went into what they
        had computed before. cost: how many more seats would be empty for another turn.
        """
        seconds = 0.0 if self._booked_at is None else now - self._booked_at
        self._booked_at = now
        num_served = num_running + num_lost
        num_redone = redone * num_running
        self._redone += seconds * num_redone
        self._saved = min(self._max_saved, self._saved + seconds * (SHARE * num_served - num_lost - num_redone))
        weight = min(1.0, seconds / (_REMEMBERS * self._turn_s))
        self._served += weight * (num_served - self._served)
        self._cost = max(cost, self._cost + weight * (cost - self._cost))

    def take(self) -> None:
        """A turn begins."""
        self._redone_a_turn += (self._redone - self._redone_a_turn) / _REMEMBERS
        self._redone = 0.0

    def allows(self, num_lost: float, num_more: float) -> bool:
        """Whether a turn may be taken that leaves so many more seats empty."""
        if num_more <= 0:
            return num_more < 0 or not self.is_overdrawn
        return (num_lost + num_more) * self._turn_s <= self._saved

    def places(self, num_places: int) -> float:
        """Of so many slots, those that turns can be taken in all the time; below 1: in one, for so much of the time."""
        cost = self._cost + self._redone_a_turn / self._turn_s
        return num_places if SHARE * self._served >= num_places * cost else SHARE * self._served / cost
