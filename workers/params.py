"""Parameters of one generation: `SamplingParams`, and the adapter to use: `LoRARequest`.

For the HTTP gateway and the offline `LLM` alike. Names and meaning are vLLM's. Leaves to others: the fields that the
engine knows too (scheduling/sampling_options.py). No torch, no Ray, no gRPC.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Annotated, Any

from lorafleet.workers.errors import ContextLengthError, InvalidRequestError, quoted
from lorafleet.workers.grammars.structured_outputs import StructuredOutputsParams
from lorafleet.workers.scheduling.ranges import Range, check_integer
from lorafleet.workers.scheduling.sampling_options import MAX_INT, SHARED_FIELDS, NumTokens, Sampling, SamplingOptions
from lorafleet.workers.scheduling.token_rules import (
    MAX_ALLOWED,
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_BIASED,
    BadWords,
    TokenBias,
    check_count,
    check_logit_bias,
)

MAX_N = 16
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(Sampling):
    """Options of a generation. Raises `InvalidRequestError`, naming the field, for a value out of range.

    max_tokens: None generates up to the end of the context. temperature: 0 is greedy. top_k: 0 (or -1) keeps all.
    logprobs: k returns the log-probabilities of the sampled token and of the k best at each position. seed: None draws
    one. stop: strings that end the text; they are left out of it unless include_stop_str_in_output. min_tokens: before
    that many, no EOS, stop token or stop string ends the output. logit_bias: by token id, -100 to 100, added to the
    token's logit. allowed_token_ids: no other token is sampled. bad_words: words that are not generated, neither at the
    start of a text nor after a space. stop, stop_token_ids, logit_bias, allowed_token_ids, bad_words: None means none.
    structured_outputs: what the output must be.
    """

    n: Annotated[int, Range(1, MAX_N)] = 1
    max_tokens: NumTokens | None = 16
    seed: Annotated[int, Range(-(2**63), 2**64 - 1)] | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    logit_bias: Mapping[int, float] | Mapping[str, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    stops: tuple[str, ...] = field(init=False, repr=False, default=())  # `stop` as a tuple
    stop_ids: frozenset[int] = field(init=False, repr=False, default=frozenset())  # `stop_token_ids` as a set
    bias: TokenBias = field(init=False, repr=False, default=())  # `logit_bias` in order of ids
    allowed_ids: frozenset[int] = field(init=False, repr=False, default=frozenset())  # `allowed_token_ids` as a set
    words: tuple[str, ...] = field(init=False, repr=False, default=())  # `bad_words` as a tuple

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}.", param="min_tokens"
            )
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise InvalidRequestError(
                f"structured_outputs is {quoted(self.structured_outputs)}; give StructuredOutputsParams.",
                param="structured_outputs",
            )
        object.__setattr__(self, "stops", _stop_strings(self.stop))
        object.__setattr__(self, "stop_ids", _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS))
        object.__setattr__(self, "bias", _logit_bias(self.logit_bias))
        object.__setattr__(self, "allowed_ids", _allowed_ids(self.allowed_token_ids))
        object.__setattr__(self, "words", _bad_words(self.bad_words))

    def options(
        self,
        *,
        num_prompt_tokens: int,
        max_model_len: int,
        vocab_size: int,
        seed: int,
        choice: int,
        eos_token_ids: frozenset[int] = frozenset(),
        bad_words: BadWords = (),
    ) -> SamplingOptions:
        """Return the engine's options for one choice of a request with a known prompt.

        `seed` is used if the request has none. `eos_token_ids` are the tokenizer's; they end the output like the
        model's own (an adapter's tokenizer may have others). `bad_words`: the tokenizer's sequences for `words`. Raises
        `ContextLengthError` if prompt and max_tokens exceed max_model_len, `InvalidRequestError` for a token id outside
        the vocabulary.
        """
        room = max_model_len - num_prompt_tokens
        if room < 1:
            raise ContextLengthError(
                f"The prompt has {num_prompt_tokens} tokens; the context of {max_model_len} tokens leaves no room for "
                "an answer. Shorten the prompt.",
                param="prompt",
            )
        if self.max_tokens is not None and self.max_tokens > room:
            raise ContextLengthError(
                f"The prompt has {num_prompt_tokens} tokens and max_tokens is {self.max_tokens}: together "
                f"{num_prompt_tokens + self.max_tokens}, over the context of {max_model_len} tokens. Ask for at most "
                f"{room} tokens or shorten the prompt.",
                param="max_tokens",
            )
        _check_vocabulary("stop_token_ids", self.stop_ids, vocab_size)
        _check_vocabulary("logit_bias", [token_id for token_id, _ in self.bias], vocab_size)
        _check_vocabulary("allowed_token_ids", self.allowed_ids, vocab_size)
        _check_vocabulary("bad_words", [token_id for word in bad_words for token_id in word], vocab_size)
        max_tokens = room if self.max_tokens is None else self.max_tokens
        if self.min_tokens > max_tokens:
            raise ContextLengthError(
                f"min_tokens is {self.min_tokens}; only {max_tokens} tokens fit after the prompt.", param="min_tokens"
            )
        return SamplingOptions(
            **{name: getattr(self, name) for name in SHARED_FIELDS},
            max_tokens=max_tokens,
            seed=(seed if self.seed is None else self.seed) & (2**64 - 1),
            choice=choice,
            stop_token_ids=self.stop_ids if self.ignore_eos else self.stop_ids | eos_token_ids,
            logit_bias=self.bias,
            allowed_token_ids=self.allowed_ids,
            bad_words=bad_words,
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


def _token_ids(name: str, token_ids: object, limit: int) -> frozenset[int]:
    checked = _some(name, token_ids, limit)
    for token_id in checked:
        check_integer(name, token_id, 0, MAX_INT)
    return frozenset(checked)


def _allowed_ids(token_ids: object) -> frozenset[int]:
    allowed = _token_ids("allowed_token_ids", token_ids, MAX_ALLOWED)
    if token_ids is not None and not allowed:
        raise InvalidRequestError(
            "allowed_token_ids is empty, which would allow nothing; leave it out to allow all.",
            param="allowed_token_ids",
        )
    return allowed


def _logit_bias(bias: object) -> TokenBias:
    if bias is None:
        return ()
    if not isinstance(bias, Mapping):
        raise InvalidRequestError(
            f"logit_bias is {quoted(bias)}; it must be a mapping of token ids to numbers.", param="logit_bias"
        )
    check_count("logit_bias", bias, MAX_BIASED)
    values: dict[int, float] = {}
    for key, value in bias.items():
        token_id = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20 else key
        if type(token_id) is not int or not 0 <= token_id <= MAX_INT:
            raise InvalidRequestError(
                f"logit_bias has the key {quoted(key)}; keys must be token ids, 0 or greater.", param="logit_bias"
            )
        if type(value) is not int and type(value) is not float:
            raise InvalidRequestError(
                f"logit_bias of the token id {token_id} is {quoted(value)}; it must be a number.", param="logit_bias"
            )
        values[token_id] = value
    ordered = tuple(sorted(values.items()))
    check_logit_bias(ordered)
    return tuple((token_id, float(value)) for token_id, value in ordered)


def _bad_words(words: object) -> tuple[str, ...]:
    if isinstance(words, str):  # a sequence too, of letters
        raise InvalidRequestError(f"bad_words is {quoted(words)}; it must be a list.", param="bad_words")
    checked = _some("bad_words", words, MAX_BAD_WORDS)
    for word in checked:
        if not isinstance(word, str):
            raise InvalidRequestError(f"bad_words has {quoted(word)}; it must be a list of strings.", param="bad_words")
        if not word:
            raise InvalidRequestError("bad_words has an empty string; it would forbid everything.", param="bad_words")
        if len(word) > MAX_BAD_WORD_CHARS:
            raise InvalidRequestError(
                f"bad_words has a word of {len(word)} characters; the limit is {MAX_BAD_WORD_CHARS}.",
                param="bad_words",
            )
    return checked


def _check_vocabulary(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    highest = max(token_ids, default=0)
    if highest >= vocab_size:
        raise InvalidRequestError(f"{name} has {highest}; the vocabulary ends at {vocab_size - 1}.", param=name)


def _some(name: str, values: object, limit: int) -> tuple[Any, ...]:
    """Return `values` as a tuple of at most `limit`; None gives an empty one."""
    if values is None:
        return ()
    if not isinstance(values, Sequence | Set):
        raise InvalidRequestError(f"{name} is {quoted(values)}; it must be a list.", param=name)
    check_count(name, values, limit)
    return tuple(values)
