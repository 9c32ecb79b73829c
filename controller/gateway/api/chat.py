"""POST /v1/chat/completions.

Owns: messages, the shape of answers and chunks. Leaves to others: templates (workers/text/chat_template.py), everything
shared with completions (door.py, sampling.py, answer.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from aiohttp import web

from lorafleet.controller.gateway.api import null_fields
from lorafleet.controller.gateway.api.answer import answer
from lorafleet.controller.gateway.api.composition import resolve_model
from lorafleet.controller.gateway.api.door import Call, takes
from lorafleet.controller.gateway.api.logprobs import chat_logprobs
from lorafleet.controller.gateway.api.null_fields import with_nulls
from lorafleet.controller.gateway.api.sampling import sampling_params
from lorafleet.controller.gateway.api.schema import ChatRequest, check_stream_options
from lorafleet.controller.gateway.api.sse import ChunkTemplate
from lorafleet.controller.gateway.streams.generation import ChoiceDelta
from lorafleet.workers.errors import InvalidRequestError, quoted
from lorafleet.workers.params import SamplingParams
from lorafleet.workers.scheduling.ranges import allowed_of
from lorafleet.workers.text.tokenizer import Tokenizer

_ALLOWED = allowed_of(SamplingParams)
ROLES = ("system", "developer", "user", "assistant", "tool")


def _check(fields: ChatRequest) -> None:
    check_messages(fields.messages)
    check_stream_options(fields)


@takes(ChatRequest, _check)
async def create_chat_completion(call: Call[ChatRequest]) -> web.StreamResponse:
    """Answer one request: messages, `n` choices, streamed or not."""
    fields = call.fields
    model = await call.state.served(lambda table: resolve_model(table, fields))
    text, num_logprobs = model.text, _num_logprobs(fields)
    params = sampling_params(fields, text.sampling_defaults, max_tokens=_max_tokens(fields), logprobs=num_logprobs)
    call.place.take_choices(params.n, param="n")
    prompt = await call.in_thread(
        lambda: text.encode_chat(
            fields.messages,
            add_generation_prompt=fields.add_generation_prompt is not False,
            add_special_tokens=fields.add_special_tokens is True,
            max_tokens=model.max_model_len,
        )
    )
    return await answer(call, model, [prompt], params, ChatShape(text.tokenizer, num_logprobs))


def check_messages(messages: Sequence[dict[str, Any]]) -> None:
    """Raises InvalidRequestError for a message without a known role or without content."""
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
    """Return the limit on output tokens, by OpenAI's newer name if both are given; None: the rest of the context."""
    new = fields.max_completion_tokens
    _ALLOWED["max_tokens"].check("max_completion_tokens", new)
    return fields.max_tokens if new is None else new


def _num_logprobs(fields: ChatRequest) -> int | None:
    """Return the number of candidates at each position; None without `logprobs`."""
    num_top = fields.top_logprobs or 0
    _ALLOWED["logprobs"].check("top_logprobs", num_top)
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


class ChatShape:
    """The shape of one chat answer."""

    id_prefix, prompt_field = "chatcmpl", "messages"
    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"
    nullable: Sequence[str] = null_fields.CHAT_ANSWER

    def __init__(self, tokenizer: Tokenizer, num_logprobs: int | None) -> None:
        self._tokenizer = tokenizer
        self._num_logprobs = num_logprobs

    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        """Return a choice with its message."""
        message = {"role": "assistant", "content": delta.text}
        choice = {
            "index": delta.index,
            "message": with_nulls(message, null_fields.CHAT_MESSAGE),
            "logprobs": _logprobs(delta, self._tokenizer, self._num_logprobs),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        return with_nulls(choice, null_fields.CHAT_CHOICE)

    def frames(self, head: dict[str, Any], num_choices: int, *, has_usage: bool) -> ChatFrames:
        """Return the chunks of the answer."""
        return ChatFrames(head, num_choices, self._tokenizer, self._num_logprobs, has_usage=has_usage)


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
        """Yield each choice's role."""
        fields = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return (self._template.choice(index, fields) for index in range(self._num_choices))

    def delta(self, delta: ChoiceDelta) -> bytes:
        """Return a chunk with one choice's new tokens."""
        if delta.finish_reason is None and self._num_logprobs is None:
            return self._template.text(delta.index, delta.text)
        return self._template.full(delta, _logprobs(delta, self._tokenizer, self._num_logprobs))

    def usage(self, usage: dict[str, Any]) -> bytes:
        """Return the chunk with the usage."""
        return self._template.usage(usage)
