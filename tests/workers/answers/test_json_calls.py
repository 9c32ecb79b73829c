"""Calls as JSON objects: Hermes' form, Llama's, Granite's and Phi's lists; mistakes; any split of the text."""

from __future__ import annotations

import json
import random
import tracemalloc
from typing import Any

import pytest
from answer_splits import Make, parts_of, short, told

from lorafleet.workers.answers.tool_formats import TOOL_FORMATS

TOOLS = {"get_weather", "now"}


def maker(name: str) -> Make:
    return lambda: TOOL_FORMATS[name].parser(TOOLS)


HERMES = {
    "no call": ("Just text < with a mark_tool_call>", [("content", "Just text < with a mark_tool_call>")]),
    "one": (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        [("call", "get_weather", '{"city": "Paris"}')],
    ),
    "content before, two calls": (
        'Let me see.\n\n<tool_call>{"name":"now","arguments":{}}</tool_call>\n'
        '<tool_call>{"name":"f","arguments":{"a":[1]}}</tool_call>\n',
        [("content", "Let me see."), ("call", "now", "{}"), ("call", "f", '{"a":[1]}')],
    ),
    "content after": (
        '<tool_call>{"name":"now","arguments":{}}</tool_call>\n\nDone. ',
        [("call", "now", "{}"), ("content", "Done. ")],
    ),
    "arguments first": (
        '<tool_call>{"arguments": {"a": {"b": "}"}}, "name": "f"}</tool_call>',
        [("call", "f", '{"a": {"b": "}"}}')],
    ),
    "a list": (
        '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"x": 1.5e3}}]</tool_call>',
        [("call", "f", "{}"), ("call", "g", '{"x": 1.5e3}')],
    ),
    "no closing mark": ('<tool_call>\n{"name": "f", "arguments": {"a": true}}', [("call", "f", '{"a": true}')]),
    "several in one mark": (
        '<tool_call>{"name":"f","arguments":{}}\n{"name":"g","arguments":{}}</tool_call>',
        [("call", "f", "{}"), ("call", "g", "{}")],
    ),
    "no arguments": ('<tool_call>{"name": "now"}</tool_call>', [("call", "now", "{}")]),
    "null arguments": ('<tool_call>{"name": "now", "arguments": null}</tool_call>', [("call", "now", "{}")]),
    "arguments as text": (
        r'<tool_call>{"name": "f", "arguments": "{\"a\": \"b\"}"}</tool_call>',
        [("call", "f", '{"a": "b"}')],
    ),
    "marks and quotes in a string": (
        r'<tool_call>{"name": "f", "arguments": {"a": "</tool_call> \" \\"}}</tool_call>!',
        [("call", "f", r'{"a": "</tool_call> \" \\"}'), ("content", "!")],
    ),
    "a name with an escape": (r'<tool_call>{"name": "get\u005fx", "arguments": {}}', [("call", "get_x", "{}")]),
    "broken off in the arguments": ('<tool_call>{"name": "f", "arguments": {"a": "b', [("call", "f", '{"a": "b')]),
    "broken off before": ('Hm <tool_call>{"name": "f", "argu', [("content", 'Hm <tool_call>{"name": "f", "argu')]),
    "a mistake in the arguments": (
        '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call> so',
        [("call", "f", '{"a": oops}}'), ("content", "so")],
    ),
    "a mistake before": (
        '<tool_call>{"name": f, "arguments": {}}</tool_call>',
        [("content", '<tool_call>{"name": f, "arguments": {}}</tool_call>')],
    ),
    "no name": (
        '<tool_call>{"nome": "f", "arguments": {}}</tool_call>',
        [("content", '<tool_call>{"nome": "f", "arguments": {}}</tool_call>')],
    ),
    "a name that is no text": ('<tool_call>{"name": 7}', [("content", '<tool_call>{"name": 7}')]),
    "half a character as name": (r'<tool_call>{"name": "\ud800"}', [("content", r'<tool_call>{"name": "\ud800"}')]),
    "not JSON": ("<tool_call>get_weather()</tool_call>", [("content", "<tool_call>get_weather()</tool_call>")]),
    "a mistake, then a call": (
        '<tool_call> <tool_call>{"name":"f","arguments":{}}</tool_call>',
        [("content", "<tool_call>"), ("call", "f", "{}")],
    ),
    "only a part of a mark": ("a <tool_ca", [("content", "a <tool_ca")]),
    "blanks": ("  \n ", [("content", "  \n ")]),
    "nothing": ("", []),
}


@pytest.mark.parametrize("name", HERMES)
def test_hermes_calls_are_the_same_however_the_text_is_split(name: str) -> None:
    text, parts = HERMES[name]
    assert told(maker("hermes"), text) == parts


LLAMA = {
    "one": ('{"name": "get_weather", "parameters": {"c": "x"}}', [("call", "get_weather", '{"c": "x"}')]),
    "with its mark": ('<|python_tag|>{"name": "other", "parameters": {}}', [("call", "other", "{}")]),
    "a type first": ('{"type": "function", "name": "now", "parameters": {}}', [("call", "now", "{}")]),
    "several": (
        '{"name": "now", "parameters": {}}; {"name": "get_weather", "parameters": {"c": 1}}',
        [("call", "now", "{}"), ("call", "get_weather", '{"c": 1}')],
    ),
    "after text": ('I call {"name": "now", "arguments": {}}', [("content", "I call"), ("call", "now", "{}")]),
    "an object that is an answer": ('{"name": "Ann", "age": 3}', [("content", '{"name": "Ann", "age": 3}')]),
    "another object": ('{"city": "Paris"} {', [("content", '{"city": "Paris"} {')]),
    "a tool's name alone": ('{"name": "now"}', [("content", '{"name": "now"}')]),
    "arguments first": (
        '{"parameters": {}, "name": "now"}',
        [("content", '{"parameters": {}, "name": "now"}')],
    ),
    "far from its arguments": (
        f'{{"name": "now", "x": "{"y" * 1100}", "parameters": {{}}}}',
        [("content", f'{{"name": "now", "x": "{"y" * 1100}", "parameters": {{}}}}')],
    ),
}


@pytest.mark.parametrize("name", [name for name in LLAMA if not name.startswith("far")])
def test_llama_calls_need_no_mark_but_a_tools_name(name: str) -> None:
    text, parts = LLAMA[name]
    assert told(maker("llama3_json"), text) == parts


def test_an_object_is_held_back_no_longer_than_a_call_may_take_to_begin() -> None:
    text, parts = LLAMA["far from its arguments"]
    make = maker("llama3_json")
    assert short(parts_of(make, [text])) == short(parts_of(make, list(text))) == parts


LISTS = [
    ("granite", '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]'),
    ("granite", '<tool_call>[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]'),
    ("phi4_mini_json", '<|tool_call|>[{"name":"f","arguments":{"a": 1}},{"name":"g","arguments":{}}]<|/tool_call|>'),
    ("phi4_mini_json", 'functools[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]'),
]


@pytest.mark.parametrize(("name", "text"), LISTS)
def test_lists_after_a_mark_are_calls(name: str, text: str) -> None:
    assert told(maker(name), text) == [("call", "f", '{"a": 1}'), ("call", "g", "{}")]


ATOMS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>", "functools"),
    *('"name"', '"parameters"', '"type"', '"arguments"', '"now"', '{"name": "now", "arguments": {"a"', ": ", "{}"),
    *("{", "}", "[", "]", "(", ")", "=", ",", '"', "'", "\\", "1", "-", "null", "now", "x", " ", "\n", "```"),
]


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_random_text_is_read_the_same_in_pieces_and_loses_nothing_but_marks_and_blanks(name: str) -> None:
    rng = random.Random(name)
    make = maker(name)
    for _ in range(1500):
        text = "".join(rng.choices(ATOMS, k=rng.randint(1, 14)))
        whole = parts_of(make, [text])
        place = rng.randint(0, len(text))
        assert parts_of(make, list(text)) == parts_of(make, [text[:place], text[place:]]) == whole, text
        if not any(kind == "call" for kind, *_ in short(whole)):
            assert "".join(part[1] for part in short(whole)) == text


MANY = 1 << 16
HOSTILE = {
    "open brackets": '<tool_call>{"name": "now", "arguments": ' + "[" * MANY,
    "open objects": '<tool_call>{"name": "now", "arguments": ' + '{"a":' * MANY,
    "an endless string": '<tool_call>{"name": "now", "arguments": {"a": "' + "x" * (1 << 20),
    "an endless name": '<tool_call>{"name": "' + "x" * MANY,
    "an endless key": '<tool_call>{"' + "x" * MANY,
    "an endless number": '<tool_call>{"name": 1' + "1" * MANY,
    "an endless list": '<tool_call>{"name": "now", "arguments": [' + "1," * MANY,
    "marks": "<tool_call>" * MANY,
    "parts of marks": "<tool_" * MANY,
    "braces": "{" * MANY,
    "names": '{"name":"now",' * MANY,
    "calls": '<tool_call>{"name":"now","arguments":{}}</tool_call>' * (MANY >> 3),
    "blanks": " " * (1 << 20),
    "blanks after a mark": "[TOOL_CALLS]" + " " * MANY,
    "backslashes": '<tool_call>{"name": "now", "arguments": {"a": "' + "\\" * MANY,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_takes_time_in_proportion_to_its_length(name: str) -> None:
    text = HOSTILE[name]
    for parser in ("hermes", "llama3_json", "mistral"):
        make = maker(parser)
        assert parts_of(make, [text[place : place + 50] for place in range(0, len(text), 50)]) == parts_of(make, [text])


def test_deep_arguments_take_no_memory_of_their_own() -> None:
    parser = maker("hermes")()
    parser.push('<tool_call>{"name": "now", "arguments": ')
    tracemalloc.start()
    for _ in range(1 << 12):
        parser.push('{"a":' * 16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_arguments_come_as_they_are_written() -> None:
    arguments: dict[str, Any] = {"text": "a longer text with several words", "list": [1, 2, {"deep": None}]}
    text = f"<tool_call>{json.dumps({'name': 'f', 'arguments': arguments})}</tool_call>"
    parser = maker("hermes")()
    told_at = [place for place, char in enumerate(text) if parser.push(char)]
    assert len(told_at) > len(json.dumps(arguments)) - 4, "each character is told at once"
