"""POST /tokenize and /detokenize, in vLLM's shapes.

Owns: the two endpoints. Leaves to others: the tokenizer (workers/text).
"""

from __future__ import annotations

import msgspec
from aiohttp import web

from lorafleet.controller.gateway.chat import check_messages
from lorafleet.controller.gateway.composition import resolve_name
from lorafleet.controller.gateway.schema import DetokenizeRequest, TokenizeRequest, decode
from lorafleet.controller.gateway.state import STATE
from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.text.model_text import ModelText


async def tokenize(request: web.Request) -> web.Response:
    """The ids of a prompt, or of messages behind the model's template."""
    state = request.app[STATE]
    with state.intake.enter(request) as place:
        fields = decode(await place.read_body(), TokenizeRequest)
        table = state.table
        text = state.text if fields.model is None else await state.text_of(resolve_name(table, fields.model))
        if (fields.prompt is None) == (fields.messages is None):
            raise InvalidRequestError("Give either prompt or messages.", param="prompt")
        if fields.messages is not None:
            check_messages(fields.messages)
        token_ids = await state.in_thread(lambda: _encode(text, fields))
        strings = [text.tokenizer.id_to_token(token_id) for token_id in token_ids]
        answer = {
            "count": len(token_ids),
            "max_model_len": table.max_model_len,
            "tokens": token_ids,
            "token_strs": strings if fields.return_token_strs else None,
        }
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


async def detokenize(request: web.Request) -> web.Response:
    """The text of ids, special tokens included."""
    state = request.app[STATE]
    with state.intake.enter(request) as place:
        fields = decode(await place.read_body(), DetokenizeRequest)
        table = state.table
        model = None if fields.model is None else resolve_name(table, fields.model)
        text = state.text if model is None else await state.text_of(model)
        vocab_size = table.vocab_size if model is None else model.vocab_size
        bad = next((token_id for token_id in fields.tokens if not 0 <= token_id < vocab_size), None)
        if bad is not None:
            raise InvalidRequestError(
                f"tokens has the token id {bad}; ids go from 0 to {vocab_size - 1}.", param="tokens"
            )
        prompt = await state.in_thread(lambda: text.tokenizer.decode(fields.tokens, skip_special_tokens=False))
        return web.Response(body=msgspec.json.encode({"prompt": prompt}), content_type="application/json")


def _encode(text: ModelText, fields: TokenizeRequest) -> list[int]:
    if fields.messages is not None:
        return text.encode_chat(
            fields.messages,
            add_generation_prompt=fields.add_generation_prompt is not False,
            add_special_tokens=fields.add_special_tokens is True,
        )
    return text.tokenizer.encode(fields.prompt or "", fields.add_special_tokens is not False)
