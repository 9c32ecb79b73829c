"""The sampling options of one choice, for callers and for the engine.

Owns: each such field, once, with its range. Leaves to others: fields for callers only (workers/params.py), the check
(ranges.py), sampling (workers/model/sampling.py). Standard library only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Final

from lorafleet.workers.errors import InvalidRequestError, quoted
from lorafleet.workers.scheduling.ranges import Range, check_fields
from lorafleet.workers.scheduling.token_rules import (
    MAX_ALLOWED,
    BadWords,
    TokenBias,
    check_bad_words,
    check_count,
    check_logit_bias,
)

MAX_INT: Final = 2**31 - 1
MAX_LOGPROBS: Final = 20
MAX_GRAMMAR_CHARS: Final = 1 << 20

NumTokens = Annotated[int, Range(1, MAX_INT)]
Fraction = Annotated[float, Range(0.0, 1.0)]
Penalty = Annotated[float, Range(-2.0, 2.0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The fields that callers and the engine share. Raises `InvalidRequestError` for a value out of range.

    A field added here is known to the offline API, to the engine and, once worker.proto has it, to the wire.
    """

    min_tokens: Annotated[int, Range(0, MAX_INT)] = 0  # until then neither EOS nor a stop token can be sampled
    temperature: Annotated[float, Range(0.0, 100.0)] = 1.0  # 0 is greedy
    top_p: Annotated[float, Range(0.0, 1.0, is_open=True)] = 1.0  # 1 keeps all
    top_k: Annotated[int, Range(-1, MAX_INT)] = 0  # 0 (or -1) keeps all
    min_p: Fraction = 0.0  # 0 keeps all
    repetition_penalty: Annotated[float, Range(0.0, 100.0, is_open=True)] = 1.0  # over prompt and output
    presence_penalty: Penalty = 0.0  # over output
    frequency_penalty: Penalty = 0.0  # over output
    logprobs: Annotated[int, Range(0, MAX_LOGPROBS)] | None = None  # k: the sampled token's and the k best; None: none
    ignore_eos: bool = False
    grammar: str = ""  # that the output must follow, checked (workers/grammars); empty: none

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.grammar, str) or len(self.grammar) > MAX_GRAMMAR_CHARS:
            raise InvalidRequestError(
                f"grammar is {quoted(self.grammar)}; it must be a text of at most {MAX_GRAMMAR_CHARS} characters.",
                param="grammar",
            )


SHARED_FIELDS: Final = tuple(field.name for field in dataclasses.fields(Sampling))


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions(Sampling):
    """One choice's sampling options, with every default resolved by the front end (gateway or `LLM`).

    Front ends check the ranges; they are checked again when this is built from a message, since the worker must not
    depend on its senders.
    """

    max_tokens: NumTokens
    seed: int = 0  # random numbers depend only on this, `choice` and the output position
    choice: int = 0  # index among the `n` choices of one API request
    stop_token_ids: frozenset[int] = frozenset()  # the caller's, and the model's and tokenizer's end tokens
    logit_bias: TokenBias = ()
    allowed_token_ids: frozenset[int] = frozenset()  # no other token is sampled; empty allows all
    bad_words: BadWords = ()

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        check_logit_bias(self.logit_bias)
        check_count("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED)
        check_bad_words(self.bad_words)
        if self.top_k < 0:
            object.__setattr__(self, "top_k", 0)
