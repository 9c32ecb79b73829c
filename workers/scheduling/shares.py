"""Places shared by several holders (choices, connections, bytes): how many each holds, and which may take more.

Owns: the rule. Leaves to others: what a place is, and the message of a refusal.

An eighth of the places is reserved for holders of few. The rest, divided by the number of holders (including those
refused recently), is the share of each. Up to its share a holder gets places as long as there are any. Beyond it,
since unused places help no one, it gets more, but only unreserved ones and only while no holder below its share was
refused recently. So one holder alone may have seven eighths, and a newcomer finds an eighth free. If the newcomer wants
more, it gets that as soon as the others have given it back, since meanwhile they get nothing new.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

RESERVE: Final = 8  # an eighth
CLAIM_S: Final = 5.0  # time for which a refusal counts


@dataclass(frozen=True, slots=True)
class Refusal:
    """The state at the time of a refusal."""

    limit: int  # all places
    num_taken: int  # places taken
    num_held: int  # by the refused holder
    share: int  # of the refused holder
    num_holders: int  # that hold or want places, the refused one included


class Shares:
    """The places of all holders, by name. For the holder '' nothing is reserved: it has no others to share with."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.num_taken = 0
        self._clock = clock
        self._held: dict[str, int] = {}
        self._claims: dict[str, float] = {}  # holders refused below their share → expiry; oldest first
        self._num_claims_only = 0  # of these, holders without a place

    def held(self, holder: str) -> int:
        """Return the number of places that it holds."""
        return self._held.get(holder, 0)

    def most(self, holder: str) -> int:
        """Return the number of places that it may hold while there is no other holder."""
        return self.limit - (self.limit // RESERVE if holder else 0)

    def take(self, holder: str, num_places: int = 1) -> Refusal | None:
        """Give `holder` more places, to be given back later; or return the refusal."""
        self._expire_claims()
        most = self.most(holder)
        is_new = holder not in self._held and holder not in self._claims
        num_holders = len(self._held) + self._num_claims_only + is_new
        share = max(1, most // num_holders)
        num_held = self.held(holder)
        total = self.num_taken + num_places
        if num_held + num_places <= share:
            fits = total <= self.limit
            if not fits:
                self._claim(holder)
        else:
            others_claim = len(self._claims) > (holder in self._claims)
            fits = total <= most and not others_claim
        if not fits:
            return Refusal(self.limit, self.num_taken, num_held, share, num_holders)
        self._drop_claim(holder)
        self._held[holder] = num_held + num_places
        self.num_taken = total
        return None

    def give_back(self, holder: str, num_places: int = 1) -> None:
        """Give back places that `take` gave."""
        left = self._held[holder] - num_places
        assert left >= 0
        if left:
            self._held[holder] = left
        else:
            del self._held[holder]
            self._num_claims_only += holder in self._claims
        self.num_taken -= num_places

    def check_integrity(self) -> None:
        """Check the counters. For tests."""
        assert self.num_taken == sum(self._held.values()) <= self.limit
        assert all(count > 0 for count in self._held.values())
        assert self._num_claims_only == len(self._claims.keys() - self._held.keys())
        assert list(self._claims.values()) == sorted(self._claims.values())

    def _claim(self, holder: str) -> None:
        self._drop_claim(holder)  # so that the oldest stays first
        self._claims[holder] = self._clock() + CLAIM_S
        self._num_claims_only += holder not in self._held

    def _drop_claim(self, holder: str) -> None:
        if self._claims.pop(holder, None) is not None:
            self._num_claims_only -= holder not in self._held

    def _expire_claims(self) -> None:
        now = self._clock()
        while self._claims:
            holder = next(iter(self._claims))
            if self._claims[holder] > now:
                break
            self._drop_claim(holder)
