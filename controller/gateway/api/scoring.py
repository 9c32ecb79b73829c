"""Requests for log-probabilities of prompts, with or without an answer, and for the best of several answers.

Owns: which combinations of these fields make sense, `best_of`. Leaves to others: their shapes (logprobs.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from lorafleet.controller.gateway.api.schema import GenerateFields
from lorafleet.controller.gateway.streams.generation import ChoiceDelta
from lorafleet.workers.errors import InvalidRequestError, quoted
from lorafleet.workers.params import SamplingParams
from lorafleet.workers.scheduling.ranges import allowed_of

_ALLOWED = allowed_of(SamplingParams)


def check_scoring(
    fields: GenerateFields, max_tokens: int | None, *, max_tokens_field: str = "max_tokens", has_echo: bool = False
) -> None:
    """Raises InvalidRequestError for a request without an answer that wants nothing of its prompt either, for prompts'
    log-probabilities in a stream, and for `best_of` that does not fit."""
    if max_tokens == 0 and not has_echo and fields.prompt_logprobs is None:
        raise InvalidRequestError(
            f"{max_tokens_field} is 0, so there is no answer. Ask for at least 1, or for prompt_logprobs (or, of "
            "completions, echo).",
            param=max_tokens_field,
        )
    if fields.stream and fields.prompt_logprobs is not None:
        raise InvalidRequestError(
            "prompt_logprobs is not supported with stream. Leave one of them out.", param="prompt_logprobs"
        )
    if fields.best_of is None:
        return
    _ALLOWED["n"].check("best_of", fields.best_of)
    n = 1 if fields.n is None else fields.n
    if fields.best_of < n:
        raise InvalidRequestError(
            f"best_of is {fields.best_of}, less than n, {quoted(n)}. Ask for at least as many.", param="best_of"
        )
    if fields.stream and fields.best_of > n:
        raise InvalidRequestError(
            f"best_of is {fields.best_of} with n {n}: which are best is known at their end, so they cannot be "
            "streamed. Leave out stream or best_of.",
            param="best_of",
        )


def candidates(fields: GenerateFields, params: SamplingParams) -> SamplingParams:
    """Return the parameters of all answers, or beams, among which the best are chosen."""
    if fields.best_of is None or fields.best_of <= params.n:
        return params
    return dataclasses.replace(params, n=fields.best_of, logprobs=params.logprobs or 0)


def best_of(deltas: Sequence[ChoiceDelta], num_generated: int, n: int) -> list[ChoiceDelta]:
    """Return, of each prompt's `num_generated` answers, the `n` with the highest mean log-probability, best first."""
    if num_generated == n:
        return list(deltas)
    chosen: list[ChoiceDelta] = []
    for first in range(0, len(deltas), num_generated):
        ranked = sorted(deltas[first : first + num_generated], key=_mean_logprob, reverse=True)
        chosen += ranked[:n]
    return [dataclasses.replace(delta, index=index) for index, delta in enumerate(chosen)]


def _mean_logprob(delta: ChoiceDelta) -> float:
    if not delta.logprobs:
        return -math.inf
    return sum(entry.logprob for entry in delta.logprobs) / len(delta.logprobs)
