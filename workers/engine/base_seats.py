"""The base model's part of the seats, which adapters' turns leave to it since it needs no slot.

It is that of the tenants that use the base model: a tenant's even share of all seats, half of it if the tenant uses
adapters too. An eighth, and one seat at least, is left to adapters.
"""

from __future__ import annotations

from collections.abc import Iterable

from lorafleet.workers.engine.shares import RESERVE


class BaseSeats:
    """Counts clients: a tenant's requests for one adapter, or for the base model."""

    def __init__(self, num_seats: int) -> None:
        self._num_seats = num_seats
        self._uses: dict[str, list[int]] = {}  # tenants → their clients of the base model, and of adapters
        self._num_halves = 0  # of tenants: two where the base model is all they use, one where it is not
        self.num_running = 0  # requests for the base model

    @property
    def part(self) -> int:
        """How many seats it has a right to."""
        part = self._num_seats * self._num_halves // (2 * len(self._uses) or 1)
        return min(part, self._num_seats - max(1, self._num_seats // RESERVE))

    def num_kept(self, num_waiting: int) -> int:
        """How many more seats are kept for so many requests that wait for it."""
        return max(0, min(self.part - self.num_running, num_waiting))

    def count(self, tenant: str, *, is_base: bool, change: int) -> None:
        """So many more of a tenant's clients are of the base model, or of adapters."""
        uses = self._uses.setdefault(tenant, [0, 0])
        self._num_halves -= _halves(uses)
        uses[not is_base] += change
        self._num_halves += _halves(uses)
        if uses == [0, 0]:
            del self._uses[tenant]

    def check_integrity(self, clients: Iterable[tuple[str, str | None]]) -> None:
        """For tests."""
        uses: dict[str, list[int]] = {}
        for tenant, adapter in clients:
            uses.setdefault(tenant, [0, 0])[adapter is not None] += 1
        assert self._uses == uses
        assert self._num_halves == sum(map(_halves, uses.values()))


def _halves(uses: list[int]) -> int:
    num_base, num_others = uses
    return (1 if num_others else 2) if num_base else 0
