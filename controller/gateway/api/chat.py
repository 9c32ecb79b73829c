"""POST /v1/chat/completions.

Owns: messages, the shape of answers and chunks. Leaves to others: templates (workers/text/chat_template.py), everything
shared with completions (door.py, sampling.py, answer.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from aiohttp import web

from lorafleet.controller.gateway.api.answer import answer
from lorafleet.controller.gateway.api.beam_search import check_beam_search
from lorafleet.controller.gateway.api.composition import resolve_model
from lorafleet.controller.gateway.api.door import Call, takes
from lorafleet.controller.gateway.api.logprobs import chat_logprobs, check_num_prompt_candidates, prompt_logprobs
from lorafleet.controller.gateway.api.sampling import sampling_params
from lorafleet.controller.gateway.api.schema import ChatRequest, check_stream_options
from lorafleet.controller.gateway.api.scoring import candidates, check_scoring
from lorafleet.controller.gateway.api.sse import ChunkTemplate
from lorafleet.controller.gateway.api.truncation import MAX_CONTEXTS, truncation_of
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
    name = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
    check_scoring(fields, _max_tokens(fields), max_tokens_field=name)
    check_beam_search(fields)


@takes(ChatRequest, _check)
async def create_chat_completion(call: Call[ChatRequest]) -> web.StreamResponse:
    """Answer one request: messages, `n` choices, streamed or not."""
    fields = call.fields
    model = await call.state.served(lambda table: resolve_model(table, fields))
    text, max_tokens = model.text, _max_tokens(fields)
    params = sampling_params(fields, text.sampling_defaults, max_tokens=max_tokens, logprobs=_num_logprobs(fields))
    truncation = truncation_of(fields, max_tokens, model.max_model_len)
    call.place.take_choices(candidates(fields, params).n, param="n")
    prompt = await call.in_thread(
        lambda: text.encode_chat(
            fields.messages,
            add_generation_prompt=fields.add_generation_prompt is not False,
            add_special_tokens=fields.add_special_tokens is True,
            max_tokens=model.max_model_len * (1 if truncation is None else MAX_CONTEXTS),
        )
    )
    if truncation is not None:
        prompt = truncation.of(prompt)
    check_num_prompt_candidates([prompt], params.prompt_logprobs)
    return await answer(call, model, [prompt], params, ChatShape(text.tokenizer, params, fields, prompt))


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


class ChatShape:
    """The shape of one chat answer."""

    id_prefix, prompt_field = "chatcmpl", "messages"
    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, fields: ChatRequest, prompt: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._fields = fields
        self._prompt = prompt
        self.has_logprobs = params.logprobs is not None
        self.has_token_ids = bool(fields.return_token_ids)

    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        """Return a choice with its message."""
        return {
            "index": delta.index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": self.logprobs(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            "token_ids": list(delta.token_ids) if self.has_token_ids else None,
        }

    def extras(self, deltas: Sequence[ChoiceDelta]) -> dict[str, Any]:
        """Return what the answer says of the prompt, which all choices share."""
        wanted = self._fields.prompt_logprobs
        return self.prompt_token_ids() | {
            "prompt_logprobs": None
            if wanted is None
            else prompt_logprobs(self._tokenizer, self._prompt, deltas[0].prompt_logprobs, wanted)
        }

    def frames(self, head: dict[str, Any], num_choices: int, *, has_usage: bool) -> ChatFrames:
        """Return the chunks of the answer."""
        return ChatFrames(head, num_choices, self, has_usage=has_usage)

    def logprobs(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        """Return the log-probabilities of a choice's new tokens, if asked for."""
        if not self.has_logprobs:
            return None
        as_ids = bool(self._fields.return_tokens_as_token_ids)
        content = chat_logprobs(self._tokenizer, delta.token_ids, delta.logprobs, as_ids=as_ids)
        return {"content": content, "refusal": None}

    def prompt_token_ids(self) -> dict[str, Any]:
        """Return the field of an answer, or of a stream's first chunks, with the prompt's ids."""
        return {"prompt_token_ids": list(self._prompt) if self.has_token_ids else None}


class ChatFrames:
    """The chunks of a streamed chat answer."""

    def __init__(self, head: dict[str, Any], num_choices: int, shape: ChatShape, *, has_usage: bool) -> None:
        def template(head: dict[str, Any]) -> ChunkTemplate:
            return ChunkTemplate(head, num_choices, b'"delta":{"content":', b"}", has_usage=has_usage)

        self._template = template(head)
        self._opening = template(head | shape.prompt_token_ids()) if shape.has_token_ids else self._template
        self._num_choices = num_choices
        self._shape = shape
        self._is_plain = not (shape.has_logprobs or shape.has_token_ids)

    def opening(self) -> Iterable[bytes]:
        """Yield each choice's role."""
        fields = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return (self._opening.choice(index, fields) for index in range(self._num_choices))

    def delta(self, delta: ChoiceDelta) -> bytes:
        """Return a chunk with one choice's new tokens."""
        if delta.finish_reason is None and self._is_plain:
            return self._template.text(delta.index, delta.text)
        more = {"token_ids": delta.token_ids} if self._shape.has_token_ids else {}
        return self._template.full(delta, self._shape.logprobs(delta), more)

    def usage(self, usage: dict[str, Any]) -> bytes:
        """Return the chunk with the usage."""
        return self._template.usage(usage)
