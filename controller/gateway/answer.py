"""What chat and completions answer with once their prompts are known: a stream, or one JSON object.

Owns: the fields of both endpoints' answers that do not depend on which it is, and that a large object is made off the
event loop. Leaves to others: what a choice says (chat.py, completions.py), streams (sse.py), tokens (generation.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

import msgspec
from aiohttp import web

from lorafleet.controller.gateway.door import Call
from lorafleet.controller.gateway.generate_request import generate_requests
from lorafleet.controller.gateway.generation import ChoiceDelta
from lorafleet.controller.gateway.schema import GenerateFields, wants_usage
from lorafleet.controller.gateway.served_model import ServedModel
from lorafleet.controller.gateway.sse import Frames, stream_answer
from lorafleet.controller.gateway.usage import usage_of
from lorafleet.workers.engine.request import MAX_NAME_CHARS
from lorafleet.workers.params import SamplingParams

_LOGPROB_BYTES: Final = 100  # about so much JSON is one candidate


class Shape(Protocol):
    """What one endpoint's answers look like."""

    id_prefix: str
    whole_object: str  # `object` of an answer that is not streamed
    chunk_object: str
    prompt_field: str  # of the request; errors about its prompts name it

    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        """A whole choice in JSON's types."""

    def frames(self, head: dict[str, Any], num_choices: int, *, has_usage: bool) -> Frames:
        """The chunks of a streamed answer."""


async def answer(
    call: Call[GenerateFields],
    model: ServedModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    shape: Shape,
) -> web.StreamResponse:
    """Generate `params.n` choices of each prompt and answer with them. Raises what is wrong with the request."""
    fields, has_usage = call.fields, wants_usage(call.fields)
    requests = generate_requests(
        prompts,
        fields,
        params,
        model,
        request_id=call.request_id,
        tenant=call.tenant,
        draw_seed=call.state.draw_seed,
        prompt_field=shape.prompt_field,
    )
    head = {
        "id": f"{shape.id_prefix}-{call.request_id}",
        "object": shape.chunk_object if fields.stream else shape.whole_object,
        "created": int(time.time()),
        "model": fields.model[:MAX_NAME_CHARS],
    }
    async with call.state.generate(requests, params, model) as generation:
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
