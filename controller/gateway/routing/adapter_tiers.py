"""Where one worker has each adapter, as its heartbeats say, and what follows from requests that were sent to it since.

A request brings its adapter into a slot, and those that follow it find it there. So that is expected from when the
request is sent until heartbeats must have told what came of it.
"""

from __future__ import annotations

from collections.abc import Iterable

from lorafleet.controller.gateway.routing.worker_view import Tier


class AdapterTiers:
    """By digest; those that are absent are left out."""

    def __init__(self) -> None:
        self.tiers: dict[str, Tier] = {}  # as the worker tells
        self.num_on_device = 0  # of these
        self._expected: frozenset[str] = frozenset()  # since the last heartbeat
        self._expected_before: frozenset[str] = frozenset()  # in the time between the two last ones

    @property
    def expected(self) -> frozenset[str]:
        """Those that will be in slots, as far as is known, though the worker may not have told so."""
        return self._expected | self._expected_before

    def update(self, changed: Iterable[tuple[str, Tier]]) -> None:
        """A heartbeat has come, with the adapters that have another place than in the one before it."""
        for digest, tier in changed:
            before = self.tiers.pop(digest, Tier.ABSENT)
            self.num_on_device += (tier is Tier.DEVICE) - (before is Tier.DEVICE)
            if tier is not Tier.ABSENT:
                self.tiers[digest] = tier
        self._expected, self._expected_before = frozenset(), self._expected

    def expect(self, adapters: Iterable[str]) -> None:
        """A request for them is being sent."""
        self._expected = self._expected.union(adapters)

    def clear(self) -> None:
        """The worker has gone; the next first heartbeat has all."""
        self.tiers = {}
        self.num_on_device = 0
        self._expected = self._expected_before = frozenset()
