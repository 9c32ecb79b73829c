"""The token budget of a step that several tenants share, learnt from the time steps take.

A single tenant's steps are as large as the batch allows, which gives the most throughput. With several tenants a step
makes them wait for each other, so it gets only as many tokens as take about `target_s`.

Owns: that number. Leaves to others: sharing it (step_shares.py), measuring (engine/loop.py).
"""

from __future__ import annotations

from typing import Final

MIN_TARGET_S: Final = 0.04  # readers do not benefit from faster streams
STRETCH: Final = 2.5  # times the duration of a step of few tokens, if that is longer
FEW: Final = 4  # tokens, which take hardly longer than one; the smallest budget
_FIRST: Final = 32  # tokens, before the first measurement
_GROWTH: Final = 1.1  # from one step to the next
_CUT: Final = 0.7  # likewise; a single slow step is weak evidence
_WEIGHT: Final = 0.1  # weight of the newest step of few tokens


class StepBudget:
    """The budget: `num_tokens` at most, while several tenants have requests."""

    def __init__(self, max_num_tokens: int) -> None:
        """max_num_tokens: limit of any step."""
        self._max_num_tokens = max_num_tokens
        self._num_tokens = float(min(_FIRST, max_num_tokens))
        self._few_s: float | None = None  # mean duration of a step of few tokens

    @property
    def num_tokens(self) -> int:
        return int(self._num_tokens)

    @property
    def target_s(self) -> float:
        """Return the target duration of a step."""
        return max(MIN_TARGET_S, STRETCH * (self._few_s or 0.0))

    def book(self, step_s: float, num_tokens: int) -> None:
        """Record that a step of `num_tokens` took `step_s`."""
        if num_tokens <= FEW:
            self._few_s = step_s if self._few_s is None else self._few_s + _WEIGHT * (step_s - self._few_s)
        bound = self._num_tokens
        if step_s <= self.target_s:
            if num_tokens >= int(bound):
                bound = max(bound, float(num_tokens)) * _GROWTH
        elif num_tokens <= bound:
            bound *= max(_CUT, self.target_s / step_s)
        self._num_tokens = min(max(bound, float(FEW)), float(self._max_num_tokens))
