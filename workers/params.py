"""Parameters of one generation: `SamplingParams`, and the adapter to use: `LoRARequest`.

For the HTTP gateway and the offline `LLM` alike. Names and meaning are vLLM's. Leaves to others: the fields that the
engine knows too (scheduling/sampling_options.py). No torch, no Ray, no gRPC.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Annotated, Any

from lorafleet.workers.errors import ContextLengthError, InvalidRequestError, quoted
from lorafleet.workers.scheduling.ranges import Range, check_integer
from lorafleet.workers.scheduling.sampling_options import MAX_INT, SHARED_FIELDS, NumTokens, Sampling, SamplingOptions

MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(Sampling):
    """Options of a generation. Raises `InvalidRequestError`, naming the field, for a value out of range.

    max_tokens: None, or more than fits, generates up to the end of the context. temperature: 0 is greedy. top_k: 0 (or
    -1) keeps all. logprobs: k returns the log-probabilities of the sampled token and of the k best at each position.
    seed: None (or -1) draws one. stop: strings that end the text; they are left out of it unless
    include_stop_str_in_output. min_tokens: before that many, no EOS, stop token or stop string ends the output. stop,
    stop_token_ids: None means none.
    """

    n: Annotated[int, Range(1, MAX_N)] = 1
    max_tokens: NumTokens | None = 16
    seed: Annotated[int, Range(-(2**63), 2**64 - 1)] | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    stops: tuple[str, ...] = field(init=False, repr=False, default=())  # `stop` as a tuple
    stop_ids: frozenset[int] = field(init=False, repr=False, default=frozenset())  # `stop_token_ids` as a set

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}.", param="min_tokens"
            )
        object.__setattr__(self, "stops", _stop_strings(self.stop))
        object.__setattr__(self, "stop_ids", _stop_token_ids(self.stop_token_ids))

    def options(
        self,
        *,
        num_prompt_tokens: int,
        max_model_len: int,
        vocab_size: int,
        seed: int,
        choice: int,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> SamplingOptions:
        """Return the engine's options for one choice of a request with a known prompt.

        `seed` is used if the request has none. `eos_token_ids` are the tokenizer's; they end the output like the
        model's own (an adapter's tokenizer may have others). More max_tokens than fit after the prompt are reduced to
        what fits. Raises `ContextLengthError` for a prompt that leaves no room, `InvalidRequestError` for a token id
        outside the vocabulary.
        """
        room = max_model_len - num_prompt_tokens
        if room < 1:
            raise ContextLengthError.beyond(
                max_model_len,
                f"The prompt has {num_prompt_tokens} tokens, which leaves no room for an answer. Shorten the prompt.",
            )
        highest = max(self.stop_ids, default=0)
        if highest >= vocab_size:
            raise InvalidRequestError(
                f"stop_token_ids has {highest}; the vocabulary ends at {vocab_size - 1}.", param="stop_token_ids"
            )
        max_tokens = room if self.max_tokens is None else min(self.max_tokens, room)
        if self.min_tokens > max_tokens:
            raise ContextLengthError.beyond(
                max_model_len,
                f"min_tokens is {self.min_tokens}; only {max_tokens} tokens fit after the prompt.",
                param="min_tokens",
            )
        return SamplingOptions(
            **{name: getattr(self, name) for name in SHARED_FIELDS},
            max_tokens=max_tokens,
            seed=(seed if self.seed in (None, -1) else self.seed) & (2**64 - 1),
            choice=choice,
            stop_token_ids=self.stop_ids if self.ignore_eos else self.stop_ids | eos_token_ids,
        )


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """The adapter to use: `LoRARequest("sql_adapter", 1, "/path/or/hub-id")`, as in vLLM.

    lora_int_id: chosen by the caller, > 0; an id stands for one adapter until that is removed. load_inplace: from now
    on the id stands for this name and path, whatever it stood for before.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool = False

    def __post_init__(self) -> None:
        for name in ("lora_name", "lora_path"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise InvalidRequestError(f"{name} is {quoted(value)}; it must be a string.", param=name)
        if not self.lora_name:
            raise InvalidRequestError("lora_name is empty; give the adapter a name.", param="lora_name")
        check_integer("lora_int_id", self.lora_int_id, 1, 2**63 - 1)
        if not self.lora_path:
            raise InvalidRequestError("lora_path is empty; give a directory or a hub id.", param="lora_path")


def _stop_strings(stop: object) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else _some("stop", stop, MAX_STOP_STRINGS)
    for text in stops:
        if not isinstance(text, str):
            raise InvalidRequestError(
                f"stop has {quoted(text)}; it must be a string or a list of strings.", param="stop"
            )
        if not text:
            raise InvalidRequestError("stop has an empty string; it would end every answer at once.", param="stop")
        if len(text) > MAX_STOP_STRING_CHARS:
            raise InvalidRequestError(
                f"stop has a string of {len(text)} characters; the limit is {MAX_STOP_STRING_CHARS}.", param="stop"
            )
    return stops


def _stop_token_ids(token_ids: object) -> frozenset[int]:
    checked = _some("stop_token_ids", token_ids, MAX_STOP_TOKEN_IDS)
    for token_id in checked:
        check_integer("stop_token_ids", token_id, 0, MAX_INT)
    return frozenset(checked)


def _some(name: str, values: object, limit: int) -> tuple[Any, ...]:
    """Return `values` as a tuple of at most `limit`; None gives an empty one."""
    if values is None:
        return ()
    if not isinstance(values, Sequence | Set):
        raise InvalidRequestError(f"{name} is {quoted(values)}; it must be a list.", param=name)
    if len(values) > limit:
        raise InvalidRequestError(f"{name} has {len(values)} entries; the limit is {limit}.", param=name)
    return tuple(values)
