"""Claims: adapters accept no new requests so that their slots come free for adapters that have waited a turn.

Example: two slots hold A and B, and C is cold. C's first request has waited for a turn (`turn_s`) while requests for A
and B kept coming. A's next request ranks before C's, B's next one after it. So B is claimed: its running requests
finish, its waiting ones stay, and when the last has finished C is loaded in its place. A is left alone.

Pure: it changes nothing, and times are the caller's. scheduler.py loads what comes free. Where the wait limit leaves no
time for that, running requests are preempted (preemption.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from lorafleet.workers.scheduling.adapter_slots import AdapterSlots
from lorafleet.workers.scheduling.flows import Flow, Flows, Rank
from lorafleet.workers.scheduling.residency import Residency


class Claims:
    """Claims one adapter for each cold one that would otherwise be passed again.

    The cold one must have waited for a turn. The claimed one must have held its slot for a turn and rank after it; the
    lowest rank is claimed first, and idle adapters before all others where a composition waits. An adapter that waits
    for memory beside its slot claims every adapter that holds some.
    """

    def __init__(self, slots: AdapterSlots, flows: Flows, residency: Residency, *, turn_s: float) -> None:
        self._slots = slots
        self._flows = flows
        self._residency = residency
        self._turn_s = turn_s

    def find(self, hot: Mapping[str, tuple[str, ...]], exempt: Set[str], now: float, hold_s: float) -> set[str]:
        """Return the adapters claimed now.

        hot: as in `Flows.hot`. exempt: adapters in slots that are not to be claimed. hold_s: how long a slot is kept at
        least.
        """
        before = now - self._turn_s
        ranks = self._claimable(hot, exempt, now - hold_s)
        claimed: set[str] = set()
        for flow in self._residency.next_at_hand() if ranks else ():
            if not ranks or flow.adapter is None or self._flows.slot_line.since(flow.adapter) > before:
                continue
            for digest in self._claimed_by(flow, ranks, hot):
                del ranks[digest]
                claimed.add(digest)
        return claimed

    def _claimable(self, hot: Mapping[str, tuple[str, ...]], exempt: Set[str], before: float) -> dict[str, Rank]:
        """Return the adapters that have held a slot since `before` and have waiting requests, with the best one's rank.

        The rank counts all who wait for an adapter. Else two adapters could claim each other's slot in turns, for ever.
        """
        ranks: dict[str, Rank] = {}
        for adapter, digests in hot.items():
            flow = self._flows.first(adapter)
            if flow is None:
                continue
            rank = self._flows.rank(flow)
            for digest in digests:
                is_ready = self._slots.slot_of(digest) is not None
                if is_ready and digest not in exempt and self._residency.was_held_at(digest, before):
                    ranks[digest] = min(rank, ranks.get(digest, rank))
        return ranks

    def _claimed_by(self, flow: Flow, ranks: Mapping[str, Rank], hot: Mapping[str, tuple[str, ...]]) -> list[str]:
        """Return the adapters that a cold flow claims: all rank after it."""
        own_rank = self._flows.rank(flow)
        missing = self._residency.missing(flow)
        lower = [other for other in self._slots.blockers(missing[0]) if other in ranks and ranks[other] > own_rank]
        if len(flow.digests) > 1:
            lower = [other for other in lower if other not in flow.digests]
            lower.sort(key=lambda other: (not self._slots.is_in_use(other), ranks[other]))
            wanted = set(flow.digests).union(*hot.values())
            return lower[-max(1, self._slots.num_lacking(len(missing), wanted)) :]
        if self._slots.lacks_bytes(missing[0]):
            return lower
        return sorted(lower, key=ranks.__getitem__)[-1:]
