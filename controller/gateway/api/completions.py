"""POST /v1/completions.

Owns: the shape of answers and chunks. Leaves to others: prompts and echo (prompts.py), everything shared with chat
(door.py, sampling.py, answer.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from aiohttp import web

from lorafleet.controller.gateway.api import null_fields
from lorafleet.controller.gateway.api.answer import answer
from lorafleet.controller.gateway.api.beam_search import check_beam_search
from lorafleet.controller.gateway.api.composition import resolve_model
from lorafleet.controller.gateway.api.door import Call, takes
from lorafleet.controller.gateway.api.logprobs import (
    CompletionColumns,
    CompletionLogprobs,
    check_num_prompt_candidates,
    joined,
    prompt_logprobs,
)
from lorafleet.controller.gateway.api.null_fields import with_nulls
from lorafleet.controller.gateway.api.prompts import echoes_of, encode_prompts, read_prompts
from lorafleet.controller.gateway.api.sampling import sampling_params
from lorafleet.controller.gateway.api.schema import CompletionRequest, check_stream_options
from lorafleet.controller.gateway.api.scoring import candidates, check_scoring
from lorafleet.controller.gateway.api.sse import ChunkTemplate
from lorafleet.controller.gateway.api.structured import requested_grammar
from lorafleet.controller.gateway.api.truncation import MAX_CONTEXTS, truncation_of
from lorafleet.controller.gateway.streams.generation import ChoiceDelta
from lorafleet.workers.params import SamplingParams
from lorafleet.workers.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def _check(fields: CompletionRequest) -> None:
    check_stream_options(fields)
    check_scoring(fields, fields.max_tokens, has_echo=bool(fields.echo))
    check_beam_search(fields)


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
    if fields.echo and params.logprobs is not None:  # the prompt has as many candidates as the answer
        num_top = max(fields.logprobs or 0, fields.prompt_logprobs or 0)
        params = dataclasses.replace(params, prompt_logprobs=num_top)
    truncation = truncation_of(fields, fields.max_tokens, max_len)
    max_num_ids = max_len if truncation is None else max_len * MAX_CONTEXTS
    asked = await call.parse(lambda: read_prompts(bytes(fields.prompt), max_num_ids))
    call.place.take_choices(len(asked) * candidates(fields, params).n, param="prompt" if len(asked) > 1 else "n")
    prompts = await call.in_thread(
        lambda: encode_prompts(text.tokenizer, asked, fields.add_special_tokens is not False, max_num_ids)
    )
    if truncation is not None:
        whole, prompts = prompts, list(map(truncation.of, prompts))
        asked = [prompt if ids is kept else kept for prompt, ids, kept in zip(asked, whole, prompts, strict=True)]
    check_num_prompt_candidates(prompts, params.prompt_logprobs)
    if fields.max_tokens is None:  # a long prompt reduces the default
        room = max_len - max(map(len, prompts))
        params = dataclasses.replace(params, max_tokens=max(min(max_tokens, room), 1))
    echoes: list[str] = []
    if fields.echo:
        skips = params.skip_special_tokens
        echoes = await call.in_thread(lambda: echoes_of(text.tokenizer, asked, params.n, skip_special_tokens=skips))
    return await answer(call, model, prompts, params, CompletionShape(text.tokenizer, params, fields, prompts, echoes))


class CompletionShape:
    """The shape of one completion."""

    id_prefix, prompt_field = "cmpl", "prompt"
    whole_object = chunk_object = "text_completion"
    nullable: Sequence[str] = null_fields.COMPLETION_ANSWER

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        fields: CompletionRequest,
        prompts: Sequence[Sequence[int]],
        echoes: list[str],
    ) -> None:
        """echoes: the prompt in front of each choice's text; empty for none."""
        self._tokenizer = tokenizer
        self._params = params
        self._fields = fields
        self._prompts = prompts
        self._echoes = echoes
        self.has_logprobs = params.logprobs is not None
        self.has_token_ids = bool(fields.return_token_ids)

    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        """Return a choice with its text."""
        wanted = self._fields.prompt_logprobs
        choice = {
            "index": delta.index,
            "text": self.echo(delta.index) + delta.text,
            "logprobs": self.opening_logprobs(self.columns(delta.index), delta) if self.has_logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            "token_ids": list(delta.token_ids) if self.has_token_ids else None,
            "prompt_logprobs": None
            if wanted is None
            else prompt_logprobs(self._tokenizer, self.prompt(delta.index), delta.prompt_logprobs, wanted),
            "prompt_token_ids": self.prompt(delta.index) if self.has_token_ids else None,
        }
        return with_nulls(choice, null_fields.COMPLETION_CHOICE)

    def extras(self, deltas: Sequence[ChoiceDelta]) -> dict[str, Any]:
        """Return no more fields of the whole answer."""
        return {}

    def frames(self, head: dict[str, Any], num_choices: int, *, has_usage: bool) -> CompletionFrames:
        """Return the chunks of the answer."""
        return CompletionFrames(head, num_choices, self, has_usage=has_usage)

    def echo(self, index: int) -> str:
        """Return what precedes a choice's text."""
        return self._echoes[index] if self._echoes else ""

    def prompt(self, index: int) -> Sequence[int]:
        """Return a choice's prompt."""
        return self._prompts[index // self._params.n]

    def columns(self, index: int) -> CompletionColumns:
        """Return a choice's columns before its first token, or before its echoed prompt."""
        return CompletionColumns(
            self._tokenizer,
            () if self._echoes else self.prompt(index)[-16:],
            skip_special_tokens=self._params.skip_special_tokens,
            as_ids=bool(self._fields.return_tokens_as_token_ids),
        )

    def opening_logprobs(self, columns: CompletionColumns, delta: ChoiceDelta) -> CompletionLogprobs:
        """Return the log-probabilities of a choice's first tokens, after those of the echoed prompt."""
        if not self._echoes:
            return columns.add(delta.token_ids, delta.logprobs)
        echoed = columns.add_prompt(self.prompt(delta.index), delta.prompt_logprobs, self._params.logprobs or 0)
        return joined(echoed, columns.add(delta.token_ids, delta.logprobs))


class CompletionFrames:
    """The chunks of a streamed completion."""

    def __init__(self, head: dict[str, Any], num_choices: int, shape: CompletionShape, *, has_usage: bool) -> None:
        self._template = ChunkTemplate(head, num_choices, b'"text":', b"", has_usage=has_usage)
        self._shape = shape
        self._columns: dict[int, CompletionColumns] = {}  # of choices that have begun
        self._is_plain = not (shape.has_logprobs or shape.has_token_ids)

    def opening(self) -> Iterable[bytes]:
        """Yield nothing: each choice's first chunk begins with its echoed prompt."""
        return ()

    def delta(self, delta: ChoiceDelta) -> bytes:
        """Return a chunk with one choice's new tokens."""
        columns = self._columns.get(delta.index)
        if columns is None:
            return self._first(delta)
        if delta.finish_reason is None and self._is_plain:
            return self._template.text(delta.index, delta.text)
        logprobs = columns.add(delta.token_ids, delta.logprobs) if self._shape.has_logprobs else None
        more = {"token_ids": delta.token_ids} if self._shape.has_token_ids else {}
        return self._template.full(delta, logprobs, more)

    def usage(self, usage: dict[str, Any]) -> bytes:
        """Return the chunk with the usage."""
        return self._template.usage(usage)

    def _first(self, delta: ChoiceDelta) -> bytes:
        shape = self._shape
        columns = self._columns[delta.index] = shape.columns(delta.index)
        logprobs = shape.opening_logprobs(columns, delta) if shape.has_logprobs else None
        more: dict[str, object] = {}
        if shape.has_token_ids:
            more = {"prompt_token_ids": shape.prompt(delta.index), "token_ids": delta.token_ids}
        return self._template.full(
            dataclasses.replace(delta, text=shape.echo(delta.index) + delta.text), logprobs, more
        )
