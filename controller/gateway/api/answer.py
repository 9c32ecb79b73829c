"""An answer that is not streamed: one JSON object.

Owns: that a large one is made off the event loop. Leaves to others: what a choice says (completions.py, chat.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from aiohttp import web

from lorafleet.controller.gateway.api.auth import TENANT
from lorafleet.controller.gateway.api.state import STATE
from lorafleet.controller.gateway.streams.generation import ChoiceDelta, Generation

_LOGPROB_BYTES: Final = 100  # about so much JSON is one candidate


def usage_of(generation: Generation) -> dict[str, Any]:
    """`usage` as OpenAI gives it. EOS counts."""
    num_prompt, num_output = generation.num_prompt_tokens, generation.num_output_tokens
    return {
        "prompt_tokens": num_prompt,
        "total_tokens": num_prompt + num_output,
        "completion_tokens": num_output,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
    }


async def answer(
    request: web.Request,
    head: dict[str, Any],
    deltas: Sequence[ChoiceDelta],
    choice_of: Callable[[ChoiceDelta], dict[str, Any]],
    *,
    usage: dict[str, Any],
    num_logprobs: int | None,
) -> web.Response:
    """The response. choice_of: a whole choice in JSON's types. num_logprobs: candidates at each position."""
    num_bytes = sum(len(delta.text) + _LOGPROB_BYTES for delta in deltas)
    if num_logprobs is not None:
        num_bytes += _LOGPROB_BYTES * (num_logprobs + 1) * sum(len(delta.logprobs) for delta in deltas)
    body = await request.app[STATE].parse(
        request[TENANT],
        num_bytes,
        lambda: msgspec.json.encode(head | {"choices": [choice_of(delta) for delta in deltas], "usage": usage}),
    )
    return web.Response(body=body, content_type="application/json")
