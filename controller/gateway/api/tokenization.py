"""POST /tokenize and /detokenize, in vLLM's shapes.

Owns: the two endpoints. Leaves to others: the tokenizer (workers/text).
"""

from __future__ import annotations

from typing import Final

import msgspec
from aiohttp import web

from lorafleet.controller.gateway.api.composition import resolve_name
from lorafleet.controller.gateway.api.door import Call, takes
from lorafleet.controller.gateway.api.messages import check_messages, encode_messages
from lorafleet.controller.gateway.api.schema import DetokenizeRequest, TokenizeRequest
from lorafleet.controller.gateway.api.served_model import ServedModel
from lorafleet.controller.gateway.api.tools import check_tools, described_tools
from lorafleet.controller.gateway.options import GatewayOptions
from lorafleet.workers.errors import ContextLengthError, InvalidRequestError

MAX_CONTEXTS: Final = 4  # limit of tokens, above one context so that too long a text is still counted


def _check(fields: TokenizeRequest) -> None:
    if (fields.prompt is None) == (fields.messages is None):
        raise InvalidRequestError("Give either prompt or messages.", param="prompt")
    if fields.messages is not None:
        check_messages(fields.messages)
    check_tools(fields.tools or ())


@takes(TokenizeRequest, _check)
async def tokenize(call: Call[TokenizeRequest]) -> web.Response:
    """Return the ids of a prompt, or of messages through the model's template."""
    model = await call.state.served(lambda table: resolve_name(table, call.fields.model))
    answer = await call.in_thread(lambda: _tokenize(model, call.fields, call.state.config))
    return web.Response(body=answer, content_type="application/json")


@takes(DetokenizeRequest)
async def detokenize(call: Call[DetokenizeRequest]) -> web.Response:
    """Return the text of ids, special tokens included."""
    model = await call.state.served(lambda table: resolve_name(table, call.fields.model))
    answer = await call.in_thread(lambda: _detokenize(model, call.fields.tokens))
    return web.Response(body=answer, content_type="application/json")


def _tokenize(model: ServedModel, fields: TokenizeRequest, options: GatewayOptions) -> bytes:
    tokenizer = model.text.tokenizer
    limit = MAX_CONTEXTS * model.max_model_len
    try:
        if fields.messages is not None:
            token_ids = encode_messages(
                model,
                fields.messages,
                fields,
                tools=described_tools(fields.tools) if fields.tools else None,
                call_syntax=model.text.tool_format(options.tool_call_parser).syntax,
                parse_special_in_content=options.parse_special_in_content,
                max_tokens=limit,
            )
        else:
            token_ids = tokenizer.encode(fields.prompt or "", fields.add_special_tokens is not False, max_tokens=limit)
    except ContextLengthError as error:
        raise ContextLengthError(
            f"The text has more than {limit} tokens, {MAX_CONTEXTS} times the context. Shorten it.", param=error.param
        ) from None
    answer = {
        "count": len(token_ids),
        "max_model_len": model.max_model_len,
        "tokens": token_ids,
        "token_strs": list(map(tokenizer.id_to_token, token_ids)) if fields.return_token_strs else None,
    }
    return msgspec.json.encode(answer)


def _detokenize(model: ServedModel, token_ids: list[int]) -> bytes:
    limit = MAX_CONTEXTS * model.max_model_len
    if len(token_ids) > limit:
        raise ContextLengthError(
            f"tokens has {len(token_ids)} ids; the limit is {limit}, {MAX_CONTEXTS} times the context.", param="tokens"
        )
    tokenizer = model.text.tokenizer
    tokenizer.check_ids(token_ids, model.entry.vocab_size, "tokens")
    return msgspec.json.encode({"prompt": tokenizer.decode(token_ids, skip_special_tokens=False)})
