"""The answer of chat and completions once the prompts are known: a stream, or one JSON object.

Owns: the fields that both endpoints' answers share, and encoding large objects off the event loop. Leaves to others:
a choice's fields (chat.py, completions.py), streams (sse.py), tokens (streams/generation.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

import msgspec
from aiohttp import web

from lorafleet.controller.gateway.api.beam_search import beam_answers
from lorafleet.controller.gateway.api.door import Call
from lorafleet.controller.gateway.api.generate_request import generate_requests
from lorafleet.controller.gateway.api.null_fields import with_nulls
from lorafleet.controller.gateway.api.schema import GenerateFields, wants_continuous_usage, wants_usage
from lorafleet.controller.gateway.api.scoring import best_of, candidates
from lorafleet.controller.gateway.api.served_model import ServedModel
from lorafleet.controller.gateway.api.sse import Frames, stream_answer
from lorafleet.controller.gateway.api.usage import usage_of
from lorafleet.controller.gateway.streams.generation import ChoiceDelta
from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.params import SamplingParams
from lorafleet.workers.scheduling.request import MAX_NAME_CHARS
from lorafleet.workers.scheduling.token_rules import BadWords
from lorafleet.workers.text.bad_words import forbidden_sequences

_LOGPROB_BYTES: Final = 100  # approximate JSON size of one candidate


class Shape(Protocol):
    """The shape of one endpoint's answers."""

    id_prefix: str
    whole_object: str  # `object` of an answer that is not streamed
    chunk_object: str
    nullable: Sequence[str]  # fields of an answer that is not streamed
    prompt_field: str  # the request field that errors about prompts name

    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        """Return a whole choice in JSON's types."""

    def extras(self, deltas: Sequence[ChoiceDelta]) -> dict[str, Any]:
        """Return more fields of a whole answer."""

    def frames(self, head: dict[str, Any], num_choices: int, *, has_usage: bool) -> Frames:
        """Return the chunks of a streamed answer."""


async def answer(
    call: Call[GenerateFields],
    model: ServedModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    shape: Shape,
    *,
    shown_tokens: frozenset[int] = frozenset(),
) -> web.StreamResponse:
    """Generate `params.n` choices of each prompt and answer with them. shown_tokens: ids of special tokens that are
    part of the text. Raises the request's errors."""
    fields, has_usage = call.fields, wants_usage(call.fields)
    generated = candidates(fields, params)
    bad_words: BadWords = ()
    if params.words:
        bad_words = await call.in_thread(lambda: forbidden_sequences(model.text.tokenizer, params.words))
    requests = generate_requests(
        prompts,
        fields,
        generated,
        model,
        request_id=call.request_id,
        tenant=call.tenant,
        draw_seed=call.state.draw_seed,
        prompt_field=shape.prompt_field,
        bad_words=bad_words,
    )
    head = {
        "id": f"{shape.id_prefix}-{call.request_id}",
        "object": shape.chunk_object if fields.stream else shape.whole_object,
        "created": int(time.time()),
        "model": (fields.model or model.entry.name)[:MAX_NAME_CHARS],
    }
    if fields.use_beam_search:
        if params.grammar:  # the profile's: a request that asks for both has been refused
            raise InvalidRequestError(
                "use_beam_search is not supported for this model, whose answers are structured by its profile.",
                param="use_beam_search",
            )
        deltas, usage = await beam_answers(call, model, requests, params, generated.n)
        return await _whole(call, head, shape, params, deltas, usage=usage)
    async with call.state.generate(requests, generated, model, shown_tokens=shown_tokens) as generation:
        if fields.stream:
            frames = shape.frames(head, generation.num_choices, has_usage=has_usage)
            return await stream_answer(
                call.request,
                generation,
                frames,
                has_usage=has_usage,
                is_usage_continuous=wants_continuous_usage(fields),
            )
        deltas = best_of(await generation.gather(), generated.n, params.n)
    return await _whole(call, head, shape, params, deltas, usage=usage_of(generation))


async def _whole(
    call: Call[GenerateFields],
    head: dict[str, Any],
    shape: Shape,
    params: SamplingParams,
    deltas: Sequence[ChoiceDelta],
    *,
    usage: dict[str, Any],
) -> web.Response:
    """Return an answer that is not streamed. Large ones are encoded off the event loop."""
    num_bytes = sum(len(delta.text) + _LOGPROB_BYTES for delta in deltas)
    if params.logprobs is not None:
        num_bytes += _LOGPROB_BYTES * (params.logprobs + 1) * sum(len(delta.logprobs) for delta in deltas)
    if params.prompt_logprobs is not None:
        num_bytes += _LOGPROB_BYTES * (params.prompt_logprobs + 1) * params.n * usage["prompt_tokens"]

    def encode() -> bytes:
        choices = [msgspec.Raw(msgspec.json.encode(shape.choice(delta))) for delta in deltas]
        top = with_nulls(head | shape.extras(deltas), shape.nullable)
        return msgspec.json.encode(top | {"choices": choices, "usage": usage})

    body = await call.state.parse(call.tenant, num_bytes, encode)
    return web.Response(body=body, content_type="application/json")
