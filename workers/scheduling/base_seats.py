"""The base model's part of the seats, which adapters' turns leave to it since it needs no slot.

Each tenant has an even share of all seats. The part is the sum of the shares of tenants that use the base model, half a
share if the tenant uses adapters too. An eighth, and one seat at least, is left to adapters.
"""

from __future__ import annotations

from collections.abc import Iterable

from lorafleet.workers.scheduling.shares import RESERVE


class BaseSeats:
    """Counts flows: a tenant's requests for one adapter, or for the base model."""

    def __init__(self, num_seats: int) -> None:
        self._num_seats = num_seats
        self._uses: dict[str, list[int]] = {}  # tenants → numbers of their flows of the base model, of adapters
        self._num_halves = 0  # half shares: two of a tenant that uses only the base model, one if adapters too
        self.num_running = 0  # running requests for the base model

    @property
    def part(self) -> int:
        """Return how many seats are the base model's."""
        part = self._num_seats * self._num_halves // (2 * len(self._uses) or 1)
        return min(part, self._num_seats - max(1, self._num_seats // RESERVE))

    def num_kept(self, num_waiting: int) -> int:
        """Return how many more seats are kept for the base model while `num_waiting` requests wait for it."""
        return max(0, min(self.part - self.num_running, num_waiting))

    def count(self, tenant: str, *, is_base: bool, change: int) -> None:
        """Count `change` more flows of a tenant, of the base model or of adapters."""
        uses = self._uses.setdefault(tenant, [0, 0])
        self._num_halves -= _halves(uses)
        uses[not is_base] += change
        self._num_halves += _halves(uses)
        if uses == [0, 0]:
            del self._uses[tenant]

    def check_integrity(self, flows: Iterable[tuple[str, str | None]]) -> None:
        """Check the counts against all flows. For tests."""
        uses: dict[str, list[int]] = {}
        for tenant, adapter in flows:
            uses.setdefault(tenant, [0, 0])[adapter is not None] += 1
        assert self._uses == uses
        assert self._num_halves == sum(map(_halves, uses.values()))


def _halves(uses: list[int]) -> int:
    num_base, num_others = uses
    return (1 if num_others else 2) if num_base else 0
