"""Outputs of the offline engines, with vLLM's fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorafleet.workers.errors import LoRAFleetError
from lorafleet.workers.params import LoRARequest
from lorafleet.workers.scheduling.logprobs import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate at one position. rank 1 is the most likely."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One of a request's `n` choices. Lists grow while the request runs."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None  # per position; the sampled token first
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"; None while running
    stop_reason: int | str | None = None  # the stop string or stop token id; None for EOS

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A request and its output so far."""

    request_id: str
    prompt: str | None  # None if the prompt was given as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # per position, complete with the first output token
    lora_request: LoRARequest | None = None
    error: LoRAFleetError | None = None  # the cause of a choice's finish_reason "error"


def logprobs_of(token_id: int, logprobs: TokenLogprobs, decode: Callable[[int], str]) -> dict[int, Logprob]:
    """Return one position's candidates by id, the token itself first."""
    row = {token_id: Logprob(logprobs.logprob, logprobs.rank, decode(token_id))}
    for rank, (top_id, value) in enumerate(zip(logprobs.top_ids, logprobs.top_logprobs, strict=True), start=1):
        row.setdefault(top_id, Logprob(value, rank, decode(top_id)))
    return row
