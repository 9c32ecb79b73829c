"""POST /v1/completions.

Owns: the shape of answers and chunks. Leaves to others: prompts and echo (prompts.py), everything shared with chat
(door.py, sampling.py, answer.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from aiohttp import web

from lorafleet.controller.gateway.api.answer import answer
from lorafleet.controller.gateway.api.composition import resolve_model
from lorafleet.controller.gateway.api.door import Call, takes
from lorafleet.controller.gateway.api.logprobs import CompletionColumns, CompletionLogprobs
from lorafleet.controller.gateway.api.prompts import echoes_of, encode_prompts, read_prompts
from lorafleet.controller.gateway.api.sampling import sampling_params
from lorafleet.controller.gateway.api.schema import CompletionRequest, check_stream_options
from lorafleet.controller.gateway.api.sse import ChunkTemplate
from lorafleet.controller.gateway.api.structured import requested_grammar
from lorafleet.controller.gateway.streams.generation import ChoiceDelta
from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.params import SamplingParams
from lorafleet.workers.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def _check(fields: CompletionRequest) -> None:
    check_stream_options(fields)
    if fields.echo and fields.logprobs is not None:
        raise InvalidRequestError("echo together with logprobs is not supported. Leave one out.", param="echo")


@takes(CompletionRequest, _check)
async def create_completion(call: Call[CompletionRequest]) -> web.StreamResponse:
    """Answer one request: any number of prompts, `n` choices of each, streamed or not."""
    fields = call.fields
    model = await call.state.served(lambda table: resolve_model(table, fields))
    text, max_len = model.text, model.max_model_len
    max_tokens = DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
    params = sampling_params(
        fields,
        text.sampling_defaults,
        max_tokens=max_tokens,
        logprobs=fields.logprobs,
        grammar=await requested_grammar(call, text.profile),
    )
    asked = await call.parse(lambda: read_prompts(bytes(fields.prompt), max_len))
    call.place.take_choices(len(asked) * params.n, param="prompt" if len(asked) > 1 else "n")
    prompts = await call.in_thread(
        lambda: encode_prompts(text.tokenizer, asked, fields.add_special_tokens is not False, max_len)
    )
    if fields.max_tokens is None:  # a long prompt reduces the default
        room = max_len - max(map(len, prompts))
        params = dataclasses.replace(params, max_tokens=max(min(max_tokens, room), 1))
    echoes: list[str] = []
    if fields.echo:
        echoes = await call.in_thread(lambda: echoes_of(text.tokenizer, asked, params.n))
    return await answer(call, model, prompts, params, CompletionShape(text.tokenizer, params, echoes))


class CompletionShape:
    """The shape of one completion."""

    id_prefix, prompt_field = "cmpl", "prompt"
    whole_object = chunk_object = "text_completion"

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, echoes: list[str]) -> None:
        """echoes: the prompt in front of each choice's text; empty for none."""
        self._tokenizer = tokenizer
        self._params = params
        self._echoes = echoes

    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        """Return a choice with its text."""
        logprobs: CompletionLogprobs | None = None
        if self._params.logprobs is not None:
            logprobs = self._columns().add(delta.token_ids, delta.logprobs)
        return {
            "index": delta.index,
            "text": (self._echoes[delta.index] if self._echoes else "") + delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def frames(self, head: dict[str, Any], num_choices: int, *, has_usage: bool) -> CompletionFrames:
        """Return the chunks of the answer."""
        columns = [self._columns() for _ in range(num_choices)] if self._params.logprobs is not None else []
        return CompletionFrames(head, num_choices, columns, self._echoes, has_usage=has_usage)

    def _columns(self) -> CompletionColumns:
        return CompletionColumns(self._tokenizer, self._params.skip_special_tokens)


class CompletionFrames:
    """The chunks of a streamed completion."""

    def __init__(
        self,
        head: dict[str, Any],
        num_choices: int,
        columns: list[CompletionColumns],
        echoes: list[str],
        *,
        has_usage: bool,
    ) -> None:
        """columns: each choice's log-probabilities; empty for none. echoes: as in `CompletionShape`."""
        self._template = ChunkTemplate(head, num_choices, b'"text":', b"", has_usage=has_usage)
        self._echoes = echoes
        self._columns = columns

    def opening(self) -> Iterable[bytes]:
        """Yield the echoed prompts, if any."""
        return (self._template.text(index, echo) for index, echo in enumerate(self._echoes))

    def delta(self, delta: ChoiceDelta) -> bytes:
        """Return a chunk with one choice's new tokens."""
        if delta.finish_reason is None and not self._columns:
            return self._template.text(delta.index, delta.text)
        logprobs = self._columns[delta.index].add(delta.token_ids, delta.logprobs) if self._columns else None
        return self._template.full(delta, logprobs)

    def usage(self, usage: dict[str, Any]) -> bytes:
        """Return the chunk with the usage."""
        return self._template.usage(usage)
