"""How many tokens a step may have, so that nobody waits for long for a stranger's: learnt from how long steps take.

One tenant's requests share steps as large as the batch allows, since these compute most. Where several tenants have
requests, a step makes them wait for each other: then it has only as many tokens as take about `target_s`.

Owns: that number. Leaves to others: whose tokens they are (step_shares.py), measuring (loop.py).
"""

from __future__ import annotations

from typing import Final

MIN_TARGET_S: Final = 0.04  # streams that get a token so often are read no faster
STRETCH: Final = 2.5  # times a step of next to no tokens, where that is longer
FEW: Final = 4  # tokens, of which a step takes hardly longer than of one; no step needs to have fewer
_FIRST: Final = 32  # tokens, while nothing is known
_GROWTH: Final = 1.1  # from one step to the next
_CUT: Final = 0.7  # likewise; one slow step does not say much
_WEIGHT: Final = 0.1  # of the newest step of few tokens


class StepBudget:
    """`num_tokens` at most, while several tenants have requests."""

    def __init__(self, max_num_tokens: int) -> None:
        """max_num_tokens: of any step."""
        self._max_num_tokens = max_num_tokens
        self._num_tokens = float(min(_FIRST, max_num_tokens))
        self._few_s: float | None = None  # a step of few tokens, on average

    @property
    def num_tokens(self) -> int:
        return int(self._num_tokens)

    @property
    def target_s(self) -> float:
        """How long a step may take."""
        return max(MIN_TARGET_S, STRETCH * (self._few_s or 0.0))

    def book(self, step_s: float, num_tokens: int) -> None:
        """A step of so many tokens took `step_s`."""
        if num_tokens <= FEW:
            self._few_s = step_s if self._few_s is None else self._few_s + _WEIGHT * (step_s - self._few_s)
        bound = self._num_tokens
        if step_s <= self.target_s:
            if num_tokens >= int(bound):
                bound = max(bound, float(num_tokens)) * _GROWTH
        elif num_tokens <= bound:
            bound *= max(_CUT, self.target_s / step_s)
        self._num_tokens = min(max(bound, float(FEW)), float(self._max_num_tokens))
