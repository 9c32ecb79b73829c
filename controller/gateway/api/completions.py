"""POST /v1/completions.

Owns: the shape of answers and chunks. Leaves to others: prompts and echo (prompts.py), everything that chat shares
(streams/generation.py, sse.py, answer.py, sampling.py).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

from aiohttp import web

from lorafleet.controller.gateway.api.answer import answer, usage_of
from lorafleet.controller.gateway.api.auth import TENANT
from lorafleet.controller.gateway.api.composition import resolve_model
from lorafleet.controller.gateway.api.errors import REQUEST_ID
from lorafleet.controller.gateway.api.logprobs import CompletionColumns, CompletionLogprobs
from lorafleet.controller.gateway.api.prompts import echoes_of, encode_prompts, read_prompts
from lorafleet.controller.gateway.api.sampling import sampling_params
from lorafleet.controller.gateway.api.schema import CompletionRequest, cache_salt_of, check_stream_options, decode
from lorafleet.controller.gateway.api.sse import ChunkTemplate, stream_answer
from lorafleet.controller.gateway.api.state import STATE
from lorafleet.controller.gateway.streams.generation import ChoiceDelta
from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.params import SamplingParams
from lorafleet.workers.scheduling.request import MAX_NAME_CHARS
from lorafleet.workers.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def create_completion(request: web.Request) -> web.StreamResponse:
    """One request: any number of prompts, `n` choices of each, streamed or not."""
    state = request.app[STATE]
    with state.intake.enter(request) as place:
        body = await place.read_body()
        tenant = request[TENANT]
        fields = await state.parse(tenant, len(body), lambda: decode(body, CompletionRequest))
        has_usage = check_stream_options(fields)
        if fields.echo and fields.logprobs is not None:
            raise InvalidRequestError("echo together with logprobs is not supported. Leave one out.", param="echo")
        table = state.table
        model = resolve_model(table, fields)
        text = await state.text_of(model)
        max_tokens = DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
        params = sampling_params(fields, text.sampling_defaults, max_tokens=max_tokens, logprobs=fields.logprobs)
        max_len = table.max_model_len
        asked = await state.parse(tenant, len(body), lambda: read_prompts(bytes(fields.prompt), max_len))
        place.take_choices(len(asked) * params.n, param="prompt" if len(asked) > 1 else "n")
        prompts = await state.in_thread(
            tenant,
            len(body),
            lambda: encode_prompts(text.tokenizer, asked, fields.add_special_tokens is not False, max_len),
        )
        if fields.max_tokens is None:  # the default gives way to a long prompt
            room = max_len - max(map(len, prompts))
            params = dataclasses.replace(params, max_tokens=max(min(max_tokens, room), 1))
        echoes: list[str] = []
        if fields.echo:
            echoes = await state.in_thread(tenant, len(body), lambda: echoes_of(text.tokenizer, asked, params.n))
        head = {
            "id": f"cmpl-{request[REQUEST_ID]}",
            "object": "text_completion",
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
            prompts=prompts,
            params=params,
            prompt_field="prompt",
        ) as generation:
            if fields.stream:
                frames = CompletionFrames(
                    head, generation.num_choices, text.tokenizer, params, echoes, has_usage=has_usage
                )
                return await stream_answer(request, generation, frames, has_usage=has_usage)
            deltas = await generation.gather()
        return await answer(
            request,
            head,
            deltas,
            lambda delta: _choice(delta, text.tokenizer, params, echoes[delta.index] if echoes else ""),
            usage=usage_of(generation),
            num_logprobs=params.logprobs,
        )


def _choice(delta: ChoiceDelta, tokenizer: Tokenizer, params: SamplingParams, echo: str) -> dict[str, Any]:
    logprobs: CompletionLogprobs | None = None
    if params.logprobs is not None:
        logprobs = CompletionColumns(tokenizer, params.skip_special_tokens).add(delta.token_ids, delta.logprobs)
    return {
        "index": delta.index,
        "text": echo + delta.text,
        "logprobs": logprobs,
        "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason,
    }


class CompletionFrames:
    """The chunks of a streamed completion."""

    def __init__(
        self,
        head: dict[str, Any],
        num_choices: int,
        tokenizer: Tokenizer,
        params: SamplingParams,
        echoes: list[str],
        *,
        has_usage: bool,
    ) -> None:
        """echoes: what each choice's text begins with; empty for none."""
        self._template = ChunkTemplate(head, num_choices, b'"text":', b"", has_usage=has_usage)
        self._echoes = echoes
        self._columns: list[CompletionColumns] = []
        if params.logprobs is not None:
            self._columns = [CompletionColumns(tokenizer, params.skip_special_tokens) for _ in range(num_choices)]

    def opening(self) -> Iterable[bytes]:
        """The echoed prompts, if any."""
        return (self._template.text(index, echo) for index, echo in enumerate(self._echoes))

    def delta(self, delta: ChoiceDelta) -> bytes:
        """One choice's gain."""
        if delta.finish_reason is None and not self._columns:
            return self._template.text(delta.index, delta.text)
        logprobs = self._columns[delta.index].add(delta.token_ids, delta.logprobs) if self._columns else None
        return self._template.full(delta, logprobs)

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk with the usage."""
        return self._template.usage(usage)
