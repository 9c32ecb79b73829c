"""How the tokens of one step are shared between tenants.

Equal shares by weight; what one does not want goes to the others. A tenant's streams leave a quarter of its share to
its prompts. Those whose prompts wait while others' are computed have a share together. Pure arithmetic.

Owns: who may have how many. Leaves to others: how many there are (step_budget.py), whose turn it is within a tenant
(scheduler.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

NEWCOMERS: Final = None  # in a tenant's place: requests that are to start, of tenants without a running prompt
_PROMPTS_PART: Final = 4  # a quarter


@dataclass(slots=True)
class Wanted:
    """What one tenant could have computed."""

    weight: float = 1.0
    num_rows: int = 0  # running requests with a single token
    num_prompt_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_rows + self.num_prompt_tokens


class StepShares:
    """Of one step: look at the room, then take."""

    def __init__(self, num_tokens: int, wanted: Mapping[str | None, Wanted] | None = None) -> None:
        """wanted: by tenant; None: tokens are for whoever comes first."""
        self.num_left = num_tokens
        self._shares = None if wanted is None else share_out(num_tokens, wanted)
        self._kept: dict[str | None, int] = {}  # for prompts
        for tenant, share in (self._shares or {}).items():
            assert wanted is not None
            self._kept[tenant] = min(wanted[tenant].num_prompt_tokens, share // _PROMPTS_PART)

    @property
    def are_shared(self) -> bool:
        return self._shares is not None

    def room(self, tenant: str | None) -> int:
        """How many more tokens a tenant's prompts may have."""
        return self.num_left if self._shares is None else max(0, min(self.num_left, self._shares.get(tenant, 0)))

    def room_for_rows(self, tenant: str | None) -> int:
        """How many more of its streams may have their token."""
        return self.num_left if self._shares is None else self.room(tenant) - self._kept[tenant]

    def take(self, tenant: str | None, num_tokens: int) -> None:
        """Fewer than 0 are given back."""
        self.num_left -= num_tokens
        if self._shares is not None:
            self._shares[tenant] -= num_tokens

    def open(self) -> None:
        """What is left is for whoever comes first."""
        self._shares = None


def share_out(num_tokens: int, wanted: Mapping[str | None, Wanted]) -> dict[str | None, int]:
    """Tokens by tenant; each has one at least, even if these are more than there are."""
    shares: dict[str | None, int] = {}
    left, weights = num_tokens, sum(entry.weight for entry in wanted.values())
    for tenant, entry in sorted(wanted.items(), key=lambda item: item[1].num_tokens / item[1].weight):
        share = max(1, min(entry.num_tokens, int(left * entry.weight / weights)))
        shares[tenant] = share
        left = max(0, left - share)
        weights -= entry.weight
    return shares
