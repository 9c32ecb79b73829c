"""From a request's fields to the sampling that goes over the wire.

Owns: which default counts (the request's, the model's, OpenAI's), the wire message. Leaves to others:
ranges and the context's length (workers/params.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafleet.controller.gateway.api.schema import SamplingFields
from lorafleet.proto import worker_pb2
from lorafleet.workers.errors import ContextLengthError
from lorafleet.workers.params import SamplingParams
from lorafleet.workers.scheduling.request import SamplingOptions

_SMALLEST = 2.0**-126  # of the wire's floats; what is less would arrive as 0
_FIELDS = SamplingFields.__struct_fields__


def sampling_params(
    fields: SamplingFields, defaults: Mapping[str, float | int], *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """defaults: of the model, for what the request leaves open. Raises InvalidRequestError for a value out of range."""
    values: dict[str, Any] = dict(defaults)
    values |= {name: value for name in _FIELDS if (value := getattr(fields, name)) is not None}
    return SamplingParams(**values, max_tokens=max_tokens, logprobs=logprobs)


def wire_sampling(
    params: SamplingParams,
    *,
    num_prompt_tokens: int,
    max_model_len: int,
    vocab_size: int,
    eos_token_ids: frozenset[int],
    seed: int,
    prompt_field: str,
) -> worker_pb2.Sampling:
    """Of all of a prompt's choices, as the first one's. seed: if the request has none. prompt_field: what an error
    about the prompt's length names."""
    try:
        options = params.options(
            num_prompt_tokens=num_prompt_tokens,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            seed=seed,
            choice=0,
            eos_token_ids=eos_token_ids,
        )
    except ContextLengthError as error:
        if error.param == "prompt":
            error.param = prompt_field
        raise
    return _wire(options)


def _wire(options: SamplingOptions) -> worker_pb2.Sampling:
    return worker_pb2.Sampling(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=max(options.top_p, _SMALLEST),
        top_k=options.top_k,
        min_p=options.min_p,
        repetition_penalty=max(options.repetition_penalty, _SMALLEST),
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        seed=options.seed,
        choice=options.choice,
        num_logprobs=options.num_logprobs,
        stop_token_ids=sorted(options.stop_token_ids),
        ignore_eos=options.ignore_eos,
        min_tokens=options.min_tokens,
    )
