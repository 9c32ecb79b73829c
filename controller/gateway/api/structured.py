"""Structured output: the fields that ask for it as one checked grammar.

Owns: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_*`, and that only one of them is given. Leaves
to others: grammars and their check (workers/grammars), enforcing them (the workers).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import msgspec

from lorafleet.controller.gateway.api.door import Call
from lorafleet.controller.gateway.api.schema import GenerateFields, ResponseFormat
from lorafleet.controller.gateway.streams.text_threads import SHORT_BYTES
from lorafleet.workers.answers.profile import Profile
from lorafleet.workers.errors import InvalidRequestError, quoted
from lorafleet.workers.grammars.grammar_text import (
    json_object_grammar,
    json_schema_grammar,
)
from lorafleet.workers.grammars.structural_tag import structural_tag_grammar
from lorafleet.workers.grammars.structured_outputs import StructuredOutputsParams, default_grammar

_CHECK_BYTES: Final = SHORT_BYTES + 1  # a check may take seconds: it is a long job of the threads, whatever its size
_GUIDED: Final = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


async def requested_grammar(call: Call[GenerateFields], profile: Profile) -> str:
    """Return the grammar that a request's output must follow, or its model's default, checked; empty: none."""
    make = grammar_maker(call.fields)
    if make is None and profile.structured_outputs and call.fields.response_format is None:
        make = "structured_outputs", functools.partial(default_grammar, profile.structured_outputs)
    return "" if make is None else await checked_grammar(call, *make)


async def checked_grammar(call: Call[Any], param: str, make: Callable[[], str]) -> str:
    """Return the grammar that `make` returns, checked off the event loop. param: the field that errors name."""
    grammar, checker = await call.parse(make), call.state.grammars
    if checker.knows(grammar):
        return checker.checked(grammar, param=param)
    return await call.state.in_thread(call.tenant, _CHECK_BYTES, lambda: checker.checked(grammar, param=param))


def grammar_maker(fields: GenerateFields) -> tuple[str, Callable[[], str]] | None:
    """Return the field that asks for structured output and a function that makes its grammar; None if none asks.

    Raises InvalidRequestError for several such fields.
    """
    makers: list[tuple[str, Callable[[], str]]] = []
    format = fields.response_format
    if format is not None and format.type != "text":
        makers.append(("response_format", lambda: response_format_grammar(format)))
    outputs = fields.structured_outputs
    if outputs is not None:
        params = StructuredOutputsParams(**msgspec.structs.asdict(outputs))
        makers.append(("structured_outputs", params.grammar_text))
    for name in _GUIDED:
        value = getattr(fields, name)
        if value is not None:
            guided = {name.removeprefix("guided_"): value, "whitespace_pattern": fields.guided_whitespace_pattern}
            makers.append((name, functools.partial(_guided, name, guided)))
    if len(makers) > 1:
        names = " and ".join(name for name, _ in makers)
        raise InvalidRequestError(f"{names} all ask for structured output. Give one of them.", param=makers[1][0])
    return makers[0] if makers else None


def response_format_grammar(format: ResponseFormat) -> str:
    """Return the grammar of a `response_format` other than text. Raises InvalidRequestError for an unknown type.

    json_schema with `strict` refuses keywords that cannot be enforced; without it they are left out, as OpenAI does its
    best then.
    """
    param = "response_format"
    if format.type == "json_object":  # some servers take a schema here
        return json_object_grammar() if format.schema is None else json_schema_grammar(format.schema, param=param)
    if format.type == "json_schema":
        if format.json_schema is None:
            raise InvalidRequestError("response_format.json_schema is missing.", param=param)
        schema = format.json_schema.schema
        if schema is None:
            return json_object_grammar()
        return json_schema_grammar(schema, param=param, is_strict=format.json_schema.strict is True)
    if format.type == "structural_tag":
        tag = {"structures": format.structures, "triggers": format.triggers}
        return structural_tag_grammar(tag if format.format is None else {"format": format.format}, param=param)
    raise InvalidRequestError(
        f"response_format.type is {quoted(format.type)}; it must be text, json_object, json_schema or structural_tag.",
        param=param,
    )


def _guided(name: str, guided: dict[str, Any]) -> str:
    return StructuredOutputsParams(**guided).grammar_text(param=name)
