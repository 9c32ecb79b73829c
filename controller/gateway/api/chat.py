"""POST /v1/chat/completions.

Owns: messages, the shape of answers and chunks. Leaves to others: templates (workers/text/chat_template.py), everything
shared with completions (door.py, sampling.py, answer.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from aiohttp import web

from lorafleet.controller.gateway.api.answer import answer
from lorafleet.controller.gateway.api.answer_form import AnswerForm, answer_form, reasoning_kwargs
from lorafleet.controller.gateway.api.chat_message import ChatMessage
from lorafleet.controller.gateway.api.composition import resolve_model
from lorafleet.controller.gateway.api.door import Call, takes
from lorafleet.controller.gateway.api.logprobs import chat_logprobs
from lorafleet.controller.gateway.api.sampling import sampling_params
from lorafleet.controller.gateway.api.schema import ChatRequest, check_stream_options
from lorafleet.controller.gateway.api.sse import ChunkTemplate
from lorafleet.controller.gateway.api.structured import checked_grammar, requested_grammar
from lorafleet.controller.gateway.api.tools import tool_use
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
    tool_use(fields)


@takes(ChatRequest, _check)
async def create_chat_completion(call: Call[ChatRequest]) -> web.StreamResponse:
    """Answer one request: messages, `n` choices, streamed or not."""
    fields = call.fields
    model = await call.state.served(lambda table: resolve_model(table, fields))
    text, num_logprobs = model.text, _num_logprobs(fields)
    params = sampling_params(
        fields,
        text.sampling_defaults,
        max_tokens=_max_tokens(fields),
        logprobs=num_logprobs,
        grammar=await requested_grammar(call, text.profile),
    )
    call.place.take_choices(params.n, param="n")
    form = answer_form(fields, text, call.state.config)
    prompt = await call.in_thread(
        lambda: text.encode_chat(
            fields.messages,
            add_generation_prompt=fields.add_generation_prompt is not False,
            add_special_tokens=fields.add_special_tokens is True,
            tools=None if form.tools is None else form.tools.described,
            call_syntax=form.calls.syntax,
            chat_template_kwargs=reasoning_kwargs(fields.reasoning_effort),
            max_tokens=model.max_model_len,
        )
    )
    is_open = form.is_open(text, prompt)
    if form.has_grammar(params.grammar):
        param = "structured_outputs" if form.tools is None else "tools"
        grammar = await checked_grammar(call, param, lambda: form.grammar(params.grammar, text, is_open))
        params = dataclasses.replace(params, grammar=grammar)
    shape = ChatShape(text.tokenizer, num_logprobs, form, is_open)
    return await answer(call, model, [prompt], params, shape, shown_tokens=text.tokenizer.special_ids(form.marks))


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
    """Return the limit on output tokens; None: the rest of the context."""
    new, old = fields.max_completion_tokens, fields.max_tokens
    if new is not None and old is not None and new != old:
        raise InvalidRequestError(
            f"max_completion_tokens is {quoted(new)} and max_tokens is {quoted(old)}. Give one of them.",
            param="max_tokens",
        )
    _ALLOWED["max_tokens"].check("max_completion_tokens", new)
    return old if new is None else new


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

    def __init__(self, tokenizer: Tokenizer, num_logprobs: int | None, form: AnswerForm, is_open: bool | None) -> None:
        """is_open: whether the prompt has begun the reasoning."""
        self._tokenizer = tokenizer
        self._num_logprobs = num_logprobs
        self._form = form
        self._is_open = is_open

    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        """Return a choice with its message."""
        message = ChatMessage(self._form, self._is_open)
        return {
            "index": delta.index,
            "message": {"role": "assistant"} | message.whole(delta.text),
            "logprobs": _logprobs(delta, self._tokenizer, self._num_logprobs),
            "finish_reason": message.finish_reason(delta.finish_reason),
            "stop_reason": delta.stop_reason,
        }

    def frames(self, head: dict[str, Any], num_choices: int, *, has_usage: bool) -> ChatFrames:
        """Return the chunks of the answer."""
        messages = [] if self._form.is_plain else [ChatMessage(self._form, self._is_open) for _ in range(num_choices)]
        return ChatFrames(head, num_choices, self._tokenizer, self._num_logprobs, messages, has_usage=has_usage)


class ChatFrames:
    """The chunks of a streamed chat answer."""

    def __init__(
        self,
        head: dict[str, Any],
        num_choices: int,
        tokenizer: Tokenizer,
        num_logprobs: int | None,
        messages: list[ChatMessage],
        *,
        has_usage: bool,
    ) -> None:
        """messages: each choice's; empty if its text is its content."""
        self._messages = messages
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
        if self._messages:
            return self._parsed(delta)
        if delta.finish_reason is None and self._num_logprobs is None:
            return self._template.text(delta.index, delta.text)
        return self._template.full(delta, _logprobs(delta, self._tokenizer, self._num_logprobs))

    def _parsed(self, delta: ChoiceDelta) -> bytes:
        """Return a chunk for each part of the message that has become certain; none if there is none."""
        message, is_last = self._messages[delta.index], delta.finish_reason is not None
        chunks: list[dict[str, Any]] = [
            {"delta": part, "logprobs": None, "finish_reason": None}
            for part in message.deltas(delta.text, is_last=is_last)
        ]
        logprobs = _logprobs(delta, self._tokenizer, self._num_logprobs)
        if is_last:
            reason = message.finish_reason(delta.finish_reason)
            chunks.append({"delta": {}, "logprobs": None, "finish_reason": reason, "stop_reason": delta.stop_reason})
        elif logprobs is not None and not chunks:
            chunks.append({"delta": {}, "logprobs": None, "finish_reason": None})
        if chunks:
            chunks[0]["logprobs"] = logprobs
        return b"".join(self._template.choice(delta.index, chunk) for chunk in chunks)

    def usage(self, usage: dict[str, Any]) -> bytes:
        """Return the chunk with the usage."""
        return self._template.usage(usage)
