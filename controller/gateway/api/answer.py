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

from lorafleet.controller.gateway.api.door import Call
from lorafleet.controller.gateway.api.generate_request import generate_requests
from lorafleet.controller.gateway.api.schema import GenerateFields, wants_usage
from lorafleet.controller.gateway.api.served_model import ServedModel
from lorafleet.controller.gateway.api.sse import Frames, stream_answer
from lorafleet.controller.gateway.api.usage import usage_of
from lorafleet.controller.gateway.streams.generation import ChoiceDelta
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
    prompt_field: str  # the request field that errors about prompts name

    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        """Return a whole choice in JSON's types."""

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
    bad_words: BadWords = ()
    if params.words:
        bad_words = await call.in_thread(lambda: forbidden_sequences(model.text.tokenizer, params.words))
    requests = generate_requests(
        prompts,
        fields,
        params,
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
        "model": fields.model[:MAX_NAME_CHARS],
    }
    async with call.state.generate(requests, params, model, shown_tokens=shown_tokens) as generation:
        if fields.stream:
            frames = shape.frames(head, generation.num_choices, has_usage=has_usage)
            return await stream_answer(call.request, generation, frames, has_usage=has_usage)
        deltas = await generation.gather()
    num_bytes = sum(len(delta.text) + _LOGPROB_BYTES for delta in deltas)
    if params.logprobs is not None:
        num_bytes += _LOGPROB_BYTES * (params.logprobs + 1) * sum(len(delta.logprobs) for delta in deltas)
    usage = usage_of(generation)
    body = await call.state.parse(
        call.tenant,
        num_bytes,
        lambda: msgspec.json.encode(head | {"choices": list(map(shape.choice, deltas)), "usage": usage}),
    )
    return web.Response(body=body, content_type="application/json")
