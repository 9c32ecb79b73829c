"""Fields that ask for structured output reach the worker as one grammar."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from lorafleet.proto import worker_pb2

PERSON = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
TAG = {"structures": [{"begin": "<f=get>", "schema": PERSON, "end": "</f>"}], "triggers": ["<f="]}
PARTS = {"type": "sequence", "elements": [{"type": "regex", "pattern": "[0-9]"}]}

# (fields, a part of the grammar)
ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "json_object": ({"response_format": {"type": "json_object"}}, '%json {"type": "object"'),
    "json_object with a schema": ({"response_format": {"type": "json_object", "schema": PERSON}}, '"name"'),
    "json_schema": ({"response_format": FORMAT}, '"name"'),
    "json": ({"structured_outputs": {"json": PERSON}}, '"name"'),
    "json as text": ({"structured_outputs": {"json": '{"type": "null"}'}}, '"null"'),
    "without blanks": (
        {"structured_outputs": {"json": PERSON, "disable_any_whitespace": True}},
        '"whitespace_flexible": false',
    ),
    "closed objects": (
        {"structured_outputs": {"json": PERSON, "disable_additional_properties": True}},
        '"additionalProperties": false',
    ),
    "regex": ({"structured_outputs": {"regex": "^a/b$"}}, r"/a\/b/"),
    "choice": ({"structured_outputs": {"choice": ["yes", 'n"o']}}, r'"yes" | "n\"o"'),
    "grammar": ({"structured_outputs": {"grammar": 'start: "a"'}}, 'start: "a"'),
    "gbnf": ({"structured_outputs": {"grammar": 'root ::= "a"'}}, 'start: "a"'),
    "any object": ({"structured_outputs": {"json_object": True}}, '%json {"type": "object"'),
    "structural tag": ({"structured_outputs": {"structural_tag": TAG}}, '"<f="'),
    "structural tag as a format": ({"response_format": {"type": "structural_tag", **TAG}}, '"<f="'),
    "structural tag of parts": ({"response_format": {"type": "structural_tag", "format": PARTS}}, "[0-9]"),
    "guided_json": ({"guided_json": PERSON}, '"name"'),
    "guided_regex": ({"guided_regex": "[0-9]+"}, "/[0-9]+/"),
    "guided_choice": ({"guided_choice": ["yes", "no"]}, '"yes" | "no"'),
    "guided_grammar": ({"guided_grammar": 'start: "a"'}, 'start: "a"'),
}


@pytest.mark.parametrize("case", ASKED)
async def test_each_field_becomes_a_grammar(fleet: Any, case: str) -> None:
    fields, part = ASKED[case]
    for path, content in (
        ("/v1/completions", {"prompt": "hello"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
    ):
        status, answer = await fleet.post(path, {"model": "tiny", "max_tokens": 2, **content, **fields})
        assert status == 200, answer
    for generate in fleet.worker.generates:
        assert part in generate.sampling.grammar


@pytest.mark.parametrize("format", [None, {"type": "text"}])
async def test_text_asks_for_no_grammar(fleet: Any, format: Any) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 2, "response_format": format, "structured_outputs": None}
    status, answer = await fleet.post("/v1/completions", body)
    assert status == 200, answer
    assert fleet.worker.generates[0].sampling.grammar == ""


async def test_strict_refuses_what_cannot_be_enforced_and_without_it_that_is_left_out(fleet: Any) -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}
    for strict, expected in ((True, 400), (False, 200), (None, 200)):
        format = {"type": "json_schema", "json_schema": {"name": "set", "schema": schema, "strict": strict}}
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 2, "response_format": format}
        status, answer = await fleet.post("/v1/completions", body)
        assert status == expected
        if status == 400:
            assert "uniqueItems" in answer["error"]["message"] and answer["error"]["param"] == "response_format"


async def test_unknown_formats_are_annotations(fleet: Any) -> None:
    schema = {"type": "object", "properties": {"format": {"type": "string", "format": "binary"}}}
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 2, "guided_json": schema}
    status, answer = await fleet.post("/v1/completions", body)
    assert status == 200, answer
    assert '"format": {"type": "string"}' in fleet.worker.generates[0].sampling.grammar


async def test_an_adapters_profile_has_a_default_that_requests_may_replace(
    fleet: Any, tokenizer_files: dict[str, bytes]
) -> None:
    profile = json.dumps({"structured_outputs": {"choice": ["yes", "no"]}}).encode()
    fleet.controller.files["own"] = tokenizer_files | {"lorafleet.json": profile}
    fleet.controller.table.adapters[0].text_digest = "own"
    name = fleet.controller.table.adapters[0].name
    fleet.controller.table.version += 1
    fleet.controller.publish()
    await fleet.until(lambda: fleet.state.table.version == fleet.controller.table.version)
    text = {"response_format": {"type": "text"}}
    for fields, part in (({}, '"yes" | "no"'), ({"guided_regex": "a+"}, "/a+/"), (text, "")):
        body = {"model": name, "prompt": "hello", "max_tokens": 2, **fields}
        status, answer = await fleet.post("/v1/completions", body)
        assert status == 200, answer
        assert part in fleet.worker.generates[-1].sampling.grammar
    assert fleet.worker.generates[-1].sampling.grammar == ""
    assert fleet.worker.generates[0].text_digest == "own"


async def test_a_grammar_that_explodes_is_a_400_and_others_are_answered_meanwhile(fleet: Any) -> None:
    """The check takes seconds of a process; requests with and without a grammar go on beside it."""
    patterns = {f"^a{i}.*b{i}$": {"type": "string"} for i in range(1000)}
    plain = {"model": "tiny", "prompt": "hello", "max_tokens": 2}
    await fleet.post("/v1/completions", plain | {"guided_regex": "a+"})
    hostile = asyncio.ensure_future(
        fleet.post("/v1/completions", plain | {"guided_json": {"patternProperties": patterns}})
    )
    num_answered = 0
    while not hostile.done():
        for fields in ({}, {"guided_regex": "a+"}):
            status, answer = await fleet.post("/v1/completions", plain | fields)
            assert status == 200, answer
            num_answered += 1
    status, answer = await hostile
    assert status == 400 and "too complex" in answer["error"]["message"]
    assert answer["error"]["param"] == "guided_json" and num_answered > 10


async def test_a_complete_answer_shows_its_last_token_and_ends_with_stop(fleet: Any, tokenizer: Any) -> None:
    fleet.worker.answer, fleet.worker.last = tokenizer.encode("hello world!"), worker_pb2.FINISH_COMPLETE
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 50, "guided_choice": ["hello world!"]}
    status, answer = await fleet.post("/v1/completions", body)
    assert status == 200
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hello world!", "stop", None)
