"""The tokens of one step, shared between tenants.

Shares are equal by weight; unused tokens go to the other tenants. A tenant's streams leave a quarter of its share to
its prompts. Tenants whose prompts wait while others' are computed have one share together. Pure arithmetic.

Owns: how many tokens each may have. Leaves to others: the total (step_budget.py), the order within a tenant
(scheduler.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

NEWCOMERS: Final = None  # in place of a tenant: waiting requests of tenants without a running prompt
_PROMPTS_PART: Final = 4  # a quarter of the share


@dataclass(slots=True)
class Wanted:
    """The tokens that one tenant could use."""

    weight: float = 1.0
    num_rows: int = 0  # running requests with a single token
    num_prompt_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_rows + self.num_prompt_tokens


class StepShares:
    """The shares of one step. Read the room, then take."""

    def __init__(self, num_tokens: int, wanted: Mapping[str | None, Wanted] | None = None) -> None:
        """wanted: by tenant; None: first come, first served."""
        self.num_left = num_tokens
        self._shares = None if wanted is None else share_out(num_tokens, wanted)
        self._kept: dict[str | None, int] = {}  # reserved for prompts
        for tenant, share in (self._shares or {}).items():
            assert wanted is not None
            self._kept[tenant] = min(wanted[tenant].num_prompt_tokens, share // _PROMPTS_PART)

    @property
    def are_shared(self) -> bool:
        return self._shares is not None

    def room(self, tenant: str | None) -> int:
        """Return how many more tokens a tenant's prompts may have."""
        return self.num_left if self._shares is None else max(0, min(self.num_left, self._shares.get(tenant, 0)))

    def room_for_rows(self, tenant: str | None) -> int:
        """Return how many more of its streams may have their token."""
        return self.num_left if self._shares is None else self.room(tenant) - self._kept[tenant]

    def take(self, tenant: str | None, num_tokens: int) -> None:
        """Take tokens; a negative number gives some back."""
        self.num_left -= num_tokens
        if self._shares is not None:
            self._shares[tenant] -= num_tokens

    def open(self) -> None:
        """Let any tenant take what is left."""
        self._shares = None


def share_out(num_tokens: int, wanted: Mapping[str | None, Wanted]) -> dict[str | None, int]:
    """Return tokens by tenant; each gets at least one, even if that exceeds the total."""
    shares: dict[str | None, int] = {}
    left, weights = num_tokens, sum(entry.weight for entry in wanted.values())
    for tenant, entry in sorted(wanted.items(), key=lambda item: item[1].num_tokens / item[1].weight):
        share = max(1, min(entry.num_tokens, int(left * entry.weight / weights)))
        shares[tenant] = share
        left = max(0, left - share)
        weights -= entry.weight
    return shares
