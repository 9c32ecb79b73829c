"""POST /tokenize and /detokenize, in vLLM's shapes.

Owns: the two endpoints. Leaves to others: the tokenizer (workers/text).
"""

from __future__ import annotations

from typing import Final

import msgspec
from aiohttp import web

from lorafleet.controller.gateway.api.auth import TENANT
from lorafleet.controller.gateway.api.chat import check_messages
from lorafleet.controller.gateway.api.composition import resolve_name
from lorafleet.controller.gateway.api.schema import DetokenizeRequest, TokenizeRequest, decode
from lorafleet.controller.gateway.api.state import STATE
from lorafleet.workers.errors import ContextLengthError, InvalidRequestError
from lorafleet.workers.text.model_text import ModelText
from lorafleet.workers.text.tokenizer import Tokenizer

MAX_CONTEXTS: Final = 4  # of tokens, to be told how long a text is that does not fit


async def tokenize(request: web.Request) -> web.Response:
    """The ids of a prompt, or of messages through the model's template."""
    state = request.app[STATE]
    with state.intake.enter(request) as place:
        body = await place.read_body()
        tenant = request[TENANT]
        fields = await state.parse(tenant, len(body), lambda: _read(body))
        table = state.table
        text = state.text if fields.model is None else await state.text_of(resolve_name(table, fields.model))
        answer = await state.in_thread(tenant, len(body), lambda: _tokenize(text, fields, table.max_model_len))
        return web.Response(body=answer, content_type="application/json")


async def detokenize(request: web.Request) -> web.Response:
    """The text of ids, special tokens included."""
    state = request.app[STATE]
    with state.intake.enter(request) as place:
        body = await place.read_body()
        tenant = request[TENANT]
        fields = await state.parse(tenant, len(body), lambda: decode(body, DetokenizeRequest))
        table = state.table
        model = None if fields.model is None else resolve_name(table, fields.model)
        text = state.text if model is None else await state.text_of(model)
        vocab_size = table.vocab_size if model is None else model.vocab_size
        limit = MAX_CONTEXTS * table.max_model_len
        answer = await state.in_thread(
            tenant, len(body), lambda: _detokenize(text.tokenizer, fields.tokens, vocab_size, limit)
        )
        return web.Response(body=answer, content_type="application/json")


def _read(body: bytes) -> TokenizeRequest:
    fields = decode(body, TokenizeRequest)
    if (fields.prompt is None) == (fields.messages is None):
        raise InvalidRequestError("Give either prompt or messages.", param="prompt")
    if fields.messages is not None:
        check_messages(fields.messages)
    return fields


def _tokenize(text: ModelText, fields: TokenizeRequest, max_model_len: int) -> bytes:
    limit = MAX_CONTEXTS * max_model_len
    tokenizer = text.tokenizer
    if fields.messages is not None:
        token_ids = text.encode_chat(
            fields.messages,
            add_generation_prompt=fields.add_generation_prompt is not False,
            add_special_tokens=fields.add_special_tokens is True,
            max_tokens=limit,
        )
    else:
        token_ids = tokenizer.encode(fields.prompt or "", fields.add_special_tokens is not False, max_tokens=limit)
    answer = {
        "count": len(token_ids),
        "max_model_len": max_model_len,
        "tokens": token_ids,
        "token_strs": list(map(tokenizer.id_to_token, token_ids)) if fields.return_token_strs else None,
    }
    return msgspec.json.encode(answer)


def _detokenize(tokenizer: Tokenizer, token_ids: list[int], vocab_size: int, limit: int) -> bytes:
    if len(token_ids) > limit:
        raise ContextLengthError(
            f"tokens has {len(token_ids)} ids; the limit is {limit}, {MAX_CONTEXTS} times the context.", param="tokens"
        )
    tokenizer.check_ids(token_ids, vocab_size, "tokens")
    return msgspec.json.encode({"prompt": tokenizer.decode(token_ids, skip_special_tokens=False)})
