"""Beam search: which sequences are continued, and which finished ones are best.

Owns: the rules, which are those of transformers' `generate(num_beams=...)`. Leaves to others: computing the
log-probabilities of next tokens (the gateway's beam_search.py, offline/beam_search.py). Pure: standard library only.

Each round every beam is extended by each of its next tokens, and the results are ranked by their summed
log-probability. One that ends finishes if it is among the first `beam_width`; of the others the first `beam_width`
are the next beams. A finished sequence scores its sum / length ** length_penalty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

from lorafleet.workers.errors import InvalidRequestError, quoted
from lorafleet.workers.scheduling.logprobs import TokenLogprobs
from lorafleet.workers.scheduling.ranges import Range, check_fields
from lorafleet.workers.scheduling.sampling_options import MAX_INT, MAX_LOGPROBS

MAX_BEAM_WIDTH: Final = MAX_LOGPROBS - 1  # with one end token, see `BeamSearch.num_candidates`


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """Options of a beam search. Raises `InvalidRequestError` for a value out of range.

    length_penalty: above 0 favours long sequences. early_stopping: when the search ends once `beam_width` sequences
    have finished. True: at once. False: when the best beam would score less than the worst of them if it ended now.
    "never": when it would at any length, with a length_penalty above 0.
    """

    beam_width: Annotated[int, Range(1, MAX_BEAM_WIDTH)]
    max_tokens: Annotated[int, Range(1, MAX_INT)]
    min_tokens: Annotated[int, Range(0, MAX_INT)] = 0  # until then no end token is a candidate
    ignore_eos: bool = False
    length_penalty: Annotated[float, Range(-10.0, 10.0)] = 1.0
    early_stopping: Literal["never"] | bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if type(self.early_stopping) is not bool and self.early_stopping != "never":
            raise InvalidRequestError(
                f'early_stopping is {quoted(self.early_stopping)}; it must be true, false or "never".',
                param="early_stopping",
            )


@dataclass(frozen=True, slots=True)
class Beam:
    """A sequence of output tokens."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each token
    cum_logprob: float = 0.0
    ended: bool = False  # by an end token, its last

    def extended(self, token_id: int, logprobs: TokenLogprobs, *, ended: bool) -> Beam:
        """Return the sequence with one more token."""
        return Beam((*self.token_ids, token_id), (*self.logprobs, logprobs), self.cum_logprob + logprobs.logprob, ended)


@dataclass(slots=True)
class BeamSearch:
    """The search after one prompt: extend `beams` until there are none, then take the `best`."""

    params: BeamSearchParams
    end_ids: frozenset[int]
    beams: list[Beam] = field(default_factory=lambda: [Beam()])  # best first; none: the search has ended
    _finished: list[tuple[float, Beam]] = field(default_factory=list)  # with their scores, best first

    def __post_init__(self) -> None:
        if self.num_candidates > MAX_LOGPROBS:
            raise InvalidRequestError(
                f"beam_width is {self.params.beam_width}; with {len(self.end_ids)} end tokens it may be at most "
                f"{MAX_LOGPROBS - len(self.end_ids)}.",
                param="beam_width",
            )

    @property
    def num_candidates(self) -> int:
        """Return how many best next tokens of each beam are needed: of more, none could be chosen."""
        return self.params.beam_width + len(self.end_ids)

    def extend(self, following: Sequence[TokenLogprobs]) -> None:
        """Replace the beams by their best extensions. following: each beam's `num_candidates` best next tokens."""
        params = self.params
        length = len(self.beams[0].token_ids) + 1
        may_end, must_end = length >= params.min_tokens, length >= params.max_tokens
        ranked: list[Beam] = []
        for beam, entry in zip(self.beams, following, strict=True):
            for rank, (token_id, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), start=1):
                ends = token_id in self.end_ids
                if logprob > -math.inf and (may_end or not ends):
                    own = TokenLogprobs(logprob, rank, entry.top_ids, entry.top_logprobs)
                    ranked.append(beam.extended(token_id, own, ended=ends))
        ranked.sort(key=lambda beam: beam.cum_logprob, reverse=True)
        width = params.beam_width
        self._finish([beam for beam in ranked[:width] if beam.ended or must_end])
        self.beams = [] if must_end else [beam for beam in ranked if not beam.ended][:width]
        if self.beams and not self._may_improve():
            self.beams = []

    def best(self, n: int) -> list[Beam]:
        """Return the best finished sequences, best first."""
        return [beam for _, beam in self._finished[:n]]

    def _finish(self, beams: list[Beam]) -> None:
        self._finished += [(self._score(beam.cum_logprob, len(beam.token_ids)), beam) for beam in beams]
        self._finished.sort(key=lambda finished: finished[0], reverse=True)
        del self._finished[self.params.beam_width :]

    def _may_improve(self) -> bool:
        """Return whether a beam may still become one of the best finished sequences."""
        params = self.params
        if len(self._finished) < params.beam_width:
            return True
        if params.early_stopping is True:
            return False
        best = self.beams[0]
        at_most = params.early_stopping == "never" and params.length_penalty > 0
        length = params.max_tokens if at_most else len(best.token_ids)
        return self._score(best.cum_logprob, length) > self._finished[-1][0]

    def _score(self, cum_logprob: float, length: int) -> float:
        return cum_logprob / math.pow(length, self.params.length_penalty)
