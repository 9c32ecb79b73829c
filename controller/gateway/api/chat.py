"""POST /v1/chat/completions.

Owns: the shape of answers and chunks. Leaves to others: messages (messages.py), everything shared with completions
(door.py, sampling.py, answer.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from aiohttp import web

from lorafleet.controller.gateway.api import null_fields
from lorafleet.controller.gateway.api.answer import answer
from lorafleet.controller.gateway.api.answer_form import AnswerForm, answer_form, reasoning_kwargs
from lorafleet.controller.gateway.api.beam_search import check_beam_search
from lorafleet.controller.gateway.api.chat_message import ChatMessage
from lorafleet.controller.gateway.api.composition import resolve_model
from lorafleet.controller.gateway.api.door import Call, takes
from lorafleet.controller.gateway.api.logprobs import chat_logprobs, check_num_prompt_candidates, prompt_logprobs
from lorafleet.controller.gateway.api.messages import answer_role, check_messages, echo_of, encode_messages
from lorafleet.controller.gateway.api.null_fields import with_nulls
from lorafleet.controller.gateway.api.prompts import check_echo
from lorafleet.controller.gateway.api.sampling import sampling_params
from lorafleet.controller.gateway.api.schema import ChatRequest, check_stream_options
from lorafleet.controller.gateway.api.scoring import candidates, check_scoring
from lorafleet.controller.gateway.api.sse import ChunkTemplate
from lorafleet.controller.gateway.api.structured import checked_grammar, requested_grammar
from lorafleet.controller.gateway.api.tools import tool_use
from lorafleet.controller.gateway.api.truncation import MAX_CONTEXTS, truncation_of
from lorafleet.controller.gateway.streams.generation import ChoiceDelta
from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.params import SamplingParams
from lorafleet.workers.scheduling.ranges import allowed_of
from lorafleet.workers.text.tokenizer import Tokenizer

_ALLOWED = allowed_of(SamplingParams)


def _check(fields: ChatRequest) -> None:
    check_messages(fields.messages)
    check_stream_options(fields)
    name = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
    check_scoring(fields, _max_tokens(fields), max_tokens_field=name)
    tool_use(fields)
    check_beam_search(fields)


@takes(ChatRequest, _check)
async def create_chat_completion(call: Call[ChatRequest]) -> web.StreamResponse:
    """Answer one request: messages, `n` choices, streamed or not."""
    fields = call.fields
    model = await call.state.served(lambda table: resolve_model(table, fields))
    text, max_tokens = model.text, _max_tokens(fields)
    params = sampling_params(
        fields,
        text.sampling_defaults,
        max_tokens=max_tokens,
        logprobs=_num_logprobs(fields),
        grammar=await requested_grammar(call, text.profile),
    )
    truncation = truncation_of(fields, max_tokens, model.max_model_len)
    call.place.take_choices(candidates(fields, params).n, param="n")
    form = answer_form(fields, text, call.state.config)
    prompt = await call.in_thread(
        lambda: encode_messages(
            model,
            fields.messages,
            fields,
            tools=None if form.tools is None else form.tools.described,
            call_syntax=form.calls.syntax,
            template_kwargs=reasoning_kwargs(fields.reasoning_effort),
            parse_special_in_content=call.state.config.parse_special_in_content,
            max_tokens=model.max_model_len * (1 if truncation is None else MAX_CONTEXTS),
        )
    )
    if truncation is not None:
        prompt = truncation.of(prompt)
    check_num_prompt_candidates([prompt], params.prompt_logprobs)
    is_open = form.is_open(text, prompt)
    if form.has_grammar(params.grammar):
        param = "structured_outputs" if form.tools is None else "tools"
        grammar = await checked_grammar(call, param, lambda: form.grammar(params.grammar, text, is_open))
        params = dataclasses.replace(params, grammar=grammar)
    shape = ChatShape(text.tokenizer, params, fields, prompt, form, is_open=is_open)
    check_echo(params.n * len(shape.echo))
    return await answer(call, model, [prompt], params, shape, shown_tokens=text.tokenizer.special_ids(form.marks))


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


class ChatShape:
    """The shape of one chat answer."""

    id_prefix, prompt_field = "chatcmpl", "messages"
    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"
    nullable: Sequence[str] = null_fields.CHAT_ANSWER

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        fields: ChatRequest,
        prompt: Sequence[int],
        form: AnswerForm,
        *,
        is_open: bool | None,
    ) -> None:
        """is_open: whether the prompt has begun the reasoning."""
        self._tokenizer = tokenizer
        self._fields = fields
        self._prompt = prompt
        self._form = form
        self._is_open = is_open
        self.role = answer_role(fields)
        self.echo = echo_of(fields)  # what the text begins with
        self.is_plain = form.is_plain
        self.has_logprobs = params.logprobs is not None
        self.has_token_ids = bool(fields.return_token_ids)

    def message(self) -> ChatMessage:
        """Return the message of a choice before its first token."""
        return ChatMessage(self._form, self._is_open)

    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        """Return a choice with its message."""
        message = self.message()
        whole = {"role": self.role} | message.whole(delta.text)
        if self.echo:
            whole["content"] = self.echo + (whole["content"] or "")
        choice = {
            "index": delta.index,
            "message": with_nulls(whole, null_fields.CHAT_MESSAGE),
            "logprobs": self.logprobs(delta),
            "finish_reason": message.finish_reason(delta.finish_reason),
            "stop_reason": delta.stop_reason,
            "token_ids": list(delta.token_ids) if self.has_token_ids else None,
        }
        return with_nulls(choice, null_fields.CHAT_CHOICE)

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
        self._messages = [] if shape.is_plain else [shape.message() for _ in range(num_choices)]
        self._num_choices = num_choices
        self._shape = shape
        self._is_plain = not (shape.has_logprobs or shape.has_token_ids)

    def opening(self) -> Iterable[bytes]:
        """Yield each choice's role, and what its text begins with."""
        fields = {"delta": {"role": self._shape.role, "content": ""}, "logprobs": None, "finish_reason": None}
        for index in range(self._num_choices):
            yield self._opening.choice(index, fields)
            if self._shape.echo:
                yield self._template.text(index, self._shape.echo)

    def delta(self, delta: ChoiceDelta) -> bytes:
        """Return a chunk with one choice's new tokens."""
        if self._messages:
            return self._parsed(delta)
        if delta.finish_reason is None and self._is_plain:
            return self._template.text(delta.index, delta.text)
        more = {"token_ids": delta.token_ids} if self._shape.has_token_ids else {}
        return self._template.full(delta, self._shape.logprobs(delta), more)

    def _parsed(self, delta: ChoiceDelta) -> bytes:
        """Return a chunk for each part of the message that has become certain; none if there is none."""
        message, is_last = self._messages[delta.index], delta.finish_reason is not None
        chunks: list[dict[str, Any]] = [
            {"delta": part, "logprobs": None, "finish_reason": None}
            for part in message.deltas(delta.text, is_last=is_last)
        ]
        if is_last:
            reason = message.finish_reason(delta.finish_reason)
            chunks.append({"delta": {}, "logprobs": None, "finish_reason": reason, "stop_reason": delta.stop_reason})
        elif not (chunks or self._is_plain):
            chunks.append({"delta": {}, "logprobs": None, "finish_reason": None})
        if chunks and not self._is_plain:
            chunks[0]["logprobs"] = self._shape.logprobs(delta)
            chunks[0]["token_ids"] = delta.token_ids if self._shape.has_token_ids else None
        return b"".join(self._template.choice(delta.index, chunk) for chunk in chunks)

    def usage(self, usage: dict[str, Any]) -> bytes:
        """Return the chunk with the usage."""
        return self._template.usage(usage)
