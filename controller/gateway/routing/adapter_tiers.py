"""The tier of each adapter on one worker: from its heartbeats, and from the requests sent to it since.

A request brings its adapter into a slot, where the next requests find it. We expect it there from when the request is
sent until two heartbeats have had time to confirm it.
"""

from __future__ import annotations

from collections.abc import Iterable

from lorafleet.controller.gateway.routing.worker_view import Tier


class AdapterTiers:
    """The tiers by digest; absent adapters are left out."""

    def __init__(self) -> None:
        self.tiers: dict[str, Tier] = {}  # as the worker reports them
        self.num_on_device = 0  # of these
        self._expected: frozenset[str] = frozenset()  # by requests sent since the last heartbeat
        self._expected_before: frozenset[str] = frozenset()  # by requests sent between the last two

    @property
    def expected(self) -> frozenset[str]:
        """Return the adapters expected in slots, whether or not the worker has reported them there."""
        return self._expected | self._expected_before

    def update(self, changed: Iterable[tuple[str, Tier]]) -> None:
        """Take over a heartbeat: the adapters whose tier has changed since the one before."""
        for digest, tier in changed:
            before = self.tiers.pop(digest, Tier.ABSENT)
            self.num_on_device += (tier is Tier.DEVICE) - (before is Tier.DEVICE)
            if tier is not Tier.ABSENT:
                self.tiers[digest] = tier
        self._expected, self._expected_before = frozenset(), self._expected

    def expect(self, adapters: Iterable[str]) -> None:
        """Expect these adapters in slots, since a request for them is being sent."""
        self._expected = self._expected.union(adapters)

    def clear(self) -> None:
        """Forget everything: the worker is lost, and the first heartbeat of the next one lists all."""
        self.tiers = {}
        self.num_on_device = 0
        self._expected = self._expected_before = frozenset()
