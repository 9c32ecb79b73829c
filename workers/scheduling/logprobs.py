"""Log-probabilities as the engine reports them: of one output token, and of a run of prompt tokens.

They are those of the raw model distribution, before penalties and temperature. Standard library only.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position."""

    logprob: float  # of the token there
    rank: int  # of that token, 1 is the most likely
    top_ids: tuple[int, ...]  # the candidates asked for, best first
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of successive prompt tokens, in columns: a prompt is long, and objects take ten times the
    memory.
    """

    num_top: int  # candidates at each position
    logprobs: array[float]
    ranks: array[int]
    top_ids: array[int]
    top_logprobs: array[float]

    @classmethod
    def of(
        cls,
        num_top: int,
        logprobs: Sequence[float] = (),
        ranks: Sequence[int] = (),
        top_ids: Sequence[int] = (),
        top_logprobs: Sequence[float] = (),
    ) -> Self:
        """Return a copy of the columns."""
        return cls(num_top, array("f", logprobs), array("I", ranks), array("I", top_ids), array("f", top_logprobs))

    def __len__(self) -> int:
        return len(self.logprobs)

    def __iter__(self) -> Iterator[TokenLogprobs]:
        for position, (logprob, rank) in enumerate(zip(self.logprobs, self.ranks, strict=True)):
            top = slice(position * self.num_top, (position + 1) * self.num_top)
            yield TokenLogprobs(logprob, rank, tuple(self.top_ids[top]), tuple(self.top_logprobs[top]))

    def extend(self, more: PromptLogprobs) -> None:
        """Append the next tokens' columns."""
        assert more.num_top == self.num_top
        self.logprobs.extend(more.logprobs)
        self.ranks.extend(more.ranks)
        self.top_ids.extend(more.top_ids)
        self.top_logprobs.extend(more.top_logprobs)
