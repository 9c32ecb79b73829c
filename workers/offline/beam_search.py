"""Beam search over an offline engine, a token of each beam a round.

Owns: a round as one-token requests, the outputs. Leaves to others: the rules (scheduling/beam_search.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorafleet.workers.offline.outputs import Logprob, RequestOutput, logprobs_of
from lorafleet.workers.params import LoRARequest, SamplingParams
from lorafleet.workers.scheduling.beam_search import Beam, BeamSearch, BeamSearchParams
from lorafleet.workers.scheduling.logprobs import TokenLogprobs
from lorafleet.workers.text.tokenizer import Tokenizer

# Runs prompts with their parameters and adapters; returns the outputs in the same order.
Run = Callable[[Sequence[list[int]], SamplingParams, Sequence[LoRARequest | None]], list[RequestOutput]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchSequence:
    """A sequence found by beam search, its prompt included."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]  # of the output tokens
    cum_logprob: float
    text: str
    finish_reason: str  # "stop" or "length"
    stop_reason: int | None = None  # None for EOS, too
    lora_request: LoRARequest | None = None


@dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    """The sequences after one prompt, best first."""

    sequences: list[BeamSearchSequence]


def search_beams(
    prompts: Sequence[list[int]],
    params: BeamSearchParams,
    loras: Sequence[LoRARequest | None],
    tokenizers: Sequence[Tokenizer],
    run: Run,
) -> list[BeamSearchOutput]:
    """Return the best sequences after each prompt. Raises what `run` raises, and `InvalidRequestError` for too many
    beams."""
    searches = [
        BeamSearch(params, frozenset() if params.ignore_eos else tokenizer.eos_token_ids) for tokenizer in tokenizers
    ]
    num_candidates = max((search.num_candidates for search in searches), default=0)
    step = SamplingParams(max_tokens=1, temperature=0.0, logprobs=num_candidates, ignore_eos=True)
    while any(search.beams for search in searches):
        rounds = [
            ([*prompt, *beam.token_ids], lora)
            for prompt, lora, search in zip(prompts, loras, searches, strict=True)
            for beam in search.beams
        ]
        outputs = iter(run([token_ids for token_ids, _ in rounds], step, [lora for _, lora in rounds]))
        for search in searches:
            if search.beams:
                search.extend([_following(next(outputs)) for _ in search.beams])
    return [
        BeamSearchOutput([_sequence(prompt, beam, lora, tokenizer) for beam in search.best(params.beam_width)])
        for prompt, lora, tokenizer, search in zip(prompts, loras, tokenizers, searches, strict=True)
    ]


def _following(output: RequestOutput) -> TokenLogprobs:
    (choice,) = output.outputs
    assert choice.logprobs is not None
    (candidates,) = choice.logprobs
    best = sorted(candidates.items(), key=lambda candidate: candidate[1].rank)
    (sampled,) = choice.token_ids
    return TokenLogprobs(
        candidates[sampled].logprob,
        candidates[sampled].rank,
        tuple(token_id for token_id, _ in best),
        tuple(entry.logprob for _, entry in best),
    )


def _sequence(prompt: list[int], beam: Beam, lora: LoRARequest | None, tokenizer: Tokenizer) -> BeamSearchSequence:
    tokens = [*prompt, *beam.token_ids]
    return BeamSearchSequence(
        tokens=tokens,
        logprobs=[
            logprobs_of(token_id, entry, tokenizer.decode_token)
            for token_id, entry in zip(beam.token_ids, beam.logprobs, strict=True)
        ],
        cum_logprob=beam.cum_logprob,
        text=tokenizer.decode(tokens),
        finish_reason="stop" if beam.ended else "length",
        lora_request=lora,
    )
