"""POST /v1/chat/completions.

Owns: messages, the shape of answers and chunks. Leaves to others: templates (workers/text/chat_template.py) and
everything that completions share (streams/generation.py, sse.py, sampling.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from aiohttp import web

from lorafleet.controller.gateway.api.answer import answer, usage_of
from lorafleet.controller.gateway.api.auth import TENANT
from lorafleet.controller.gateway.api.composition import resolve_model
from lorafleet.controller.gateway.api.errors import REQUEST_ID
from lorafleet.controller.gateway.api.logprobs import chat_logprobs
from lorafleet.controller.gateway.api.sampling import sampling_params
from lorafleet.controller.gateway.api.schema import ChatRequest, cache_salt_of, check_stream_options, decode
from lorafleet.controller.gateway.api.sse import ChunkTemplate, stream_answer
from lorafleet.controller.gateway.api.state import STATE
from lorafleet.controller.gateway.streams.generation import ChoiceDelta
from lorafleet.workers.errors import InvalidRequestError, quoted
from lorafleet.workers.params import MAX_INT
from lorafleet.workers.scheduling.request import MAX_LOGPROBS, MAX_NAME_CHARS
from lorafleet.workers.text.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    """One request: messages, `n` choices, streamed or not."""
    state = request.app[STATE]
    with state.intake.enter(request) as place:
        body = await place.read_body()
        tenant = request[TENANT]
        fields = await state.parse(tenant, len(body), lambda: _read(body))
        has_usage = check_stream_options(fields)
        table = state.table
        model = resolve_model(table, fields)
        text = await state.text_of(model)
        num_logprobs = _num_logprobs(fields)
        params = sampling_params(fields, text.sampling_defaults, max_tokens=_max_tokens(fields), logprobs=num_logprobs)
        place.take_choices(params.n, param="n")
        prompt = await state.in_thread(
            tenant,
            len(body),
            lambda: text.encode_chat(
                fields.messages,
                add_generation_prompt=fields.add_generation_prompt is not False,
                add_special_tokens=fields.add_special_tokens is True,
                max_tokens=table.max_model_len,
            ),
        )
        head = {
            "id": f"chatcmpl-{request[REQUEST_ID]}",
            "object": "chat.completion.chunk" if fields.stream else "chat.completion",
            "created": int(time.time()),
            "model": fields.model[:MAX_NAME_CHARS],
        }
        async with state.generate(
            request_id=request[REQUEST_ID],
            tenant=tenant,
            priority=fields.priority,
            cache_salt=cache_salt_of(fields),
            table=table,
            text=text,
            model=model,
            prompts=[prompt],
            params=params,
            prompt_field="messages",
        ) as generation:
            if fields.stream:
                frames = ChatFrames(head, generation.num_choices, text.tokenizer, num_logprobs, has_usage=has_usage)
                return await stream_answer(request, generation, frames, has_usage=has_usage)
            deltas = await generation.gather()
        return await answer(
            request,
            head,
            deltas,
            lambda delta: _choice(delta, text.tokenizer, num_logprobs),
            usage=usage_of(generation),
            num_logprobs=num_logprobs,
        )


def _read(body: bytes) -> ChatRequest:
    fields = decode(body, ChatRequest)
    check_messages(fields.messages)
    return fields


def check_messages(messages: Sequence[dict[str, Any]]) -> None:
    """Raises InvalidRequestError for a message without a known role, or without anything to say."""
    if not messages:
        raise InvalidRequestError("messages is empty; there must be at least one message.", param="messages")
    for number, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            shown = quoted(role) if isinstance(role, str) else type(role).__name__
            raise InvalidRequestError(
                f"messages[{number}].role is {shown}; it must be one of {', '.join(ROLES)}.", param="messages"
            )
        if message.get("content") is None and not (role == "assistant" and message.get("tool_calls")):
            raise InvalidRequestError(f"messages[{number}].content is missing.", param="messages")


def _max_tokens(fields: ChatRequest) -> int | None:
    """None: the rest of the context."""
    new, old = fields.max_completion_tokens, fields.max_tokens
    if new is not None and old is not None and new != old:
        raise InvalidRequestError(
            f"max_completion_tokens is {quoted(new)} and max_tokens is {quoted(old)}. Give one of them.",
            param="max_tokens",
        )
    if new is not None and not 1 <= new <= MAX_INT:
        raise InvalidRequestError(
            f"max_completion_tokens is {quoted(new)}; it must be between 1 and {MAX_INT}.",
            param="max_completion_tokens",
        )
    return old if new is None else new


def _num_logprobs(fields: ChatRequest) -> int | None:
    """Candidates at each position; None without `logprobs`."""
    num_top = fields.top_logprobs or 0
    if not 0 <= num_top <= MAX_LOGPROBS:
        raise InvalidRequestError(
            f"top_logprobs is {quoted(num_top)}; it must be between 0 and {MAX_LOGPROBS}.", param="top_logprobs"
        )
    if not fields.logprobs:
        if num_top:
            raise InvalidRequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
        return None
    return num_top


def _logprobs(delta: ChoiceDelta, tokenizer: Tokenizer, num_logprobs: int | None) -> dict[str, Any] | None:
    if num_logprobs is None:
        return None
    content = chat_logprobs(tokenizer, delta.token_ids, delta.logprobs, num_logprobs)
    return {"content": content, "refusal": None}


def _choice(delta: ChoiceDelta, tokenizer: Tokenizer, num_logprobs: int | None) -> dict[str, Any]:
    return {
        "index": delta.index,
        "message": {"role": "assistant", "content": delta.text, "refusal": None},
        "logprobs": _logprobs(delta, tokenizer, num_logprobs),
        "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason,
    }


class ChatFrames:
    """The chunks of a streamed chat answer."""

    def __init__(
        self,
        head: dict[str, Any],
        num_choices: int,
        tokenizer: Tokenizer,
        num_logprobs: int | None,
        *,
        has_usage: bool,
    ) -> None:
        self._template = ChunkTemplate(head, num_choices, b'"delta":{"content":', b"}", has_usage=has_usage)
        self._num_choices = num_choices
        self._tokenizer = tokenizer
        self._num_logprobs = num_logprobs

    def opening(self) -> Iterable[bytes]:
        """Each choice's role."""
        fields = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return (self._template.choice(index, fields) for index in range(self._num_choices))

    def delta(self, delta: ChoiceDelta) -> bytes:
        """One choice's gain."""
        if delta.finish_reason is None and self._num_logprobs is None:
            return self._template.text(delta.index, delta.text)
        return self._template.full(delta, _logprobs(delta, self._tokenizer, self._num_logprobs))

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk with the usage."""
        return self._template.usage(usage)
