"""Calls as Python's."""

from __future__ import annotations

import pytest
from answer_splits import parts_of, short, told

from lorafleet.workers.answers.pythonic_calls import MAX_CALL_CHARS, PythonicCalls

CASES = {
    "a list": (
        '[f(a="x, )", b=[1, {"c": None}]), g()]',
        [("call", "f", '{"a": "x, )", "b": [1, {"c": null}]}'), ("call", "g", "{}")],
    ),
    "one without brackets": ("g(x=True)", [("call", "g", '{"x": true}')]),
    "a fence": ("```tool_code\n[f(a=-1.5e3)]\n``` ok", [("call", "f", '{"a": -1500.0}'), ("content", "ok")]),
    "a mark": ("<|python_tag|>[g()]", [("call", "g", "{}")]),
    "lines": ("f(a=1)\ng(b='it\\'s')", [("call", "f", '{"a": 1}'), ("call", "g", '{"b": "it\'s"}')]),
    "a sentence": ("I would f(a=1)", [("content", "I would f(a=1)")]),
    "a list that is an answer": ("[1, 2] and [f(a=1)]", [("content", "[1, 2] and [f(a=1)]")]),
    "an unknown name": ("[h(a=1)]", [("content", "[h(a=1)]")]),
    "an unknown name after a call": ("[f(a=1), h(b=2)]", [("call", "f", '{"a": 1}'), ("content", ", h(b=2)]")]),
    "an expression": ("[f(a=x)]", [("content", "[f(a=x)]")]),
    "a positional argument": ("[f(1)]", [("content", "[f(1)]")]),
    "brackets that do not match": ("[f(a=[1)]", [("content", "[f(a=[1)]")]),
    "broken off": ("[g(), f(a=", [("call", "g", "{}"), ("content", ", f(a=")]),
    "a word": ("  hello", [("content", "  hello")]),
    "a bracket": ("[", [("content", "[")]),
    "nothing": ("", []),
}


@pytest.mark.parametrize("name", CASES)
def test_calls_are_the_same_however_the_text_is_split(name: str) -> None:
    text, parts = CASES[name]
    assert told(lambda: PythonicCalls({"f", "g"}), text) == parts


@pytest.mark.parametrize("inner", ["'" + "x" * MAX_CALL_CHARS, "[" * MAX_CALL_CHARS, "1," * MAX_CALL_CHARS])
def test_a_call_that_is_too_long_is_content(inner: str) -> None:
    text = f"f(a={inner}"
    pieces = [text[place : place + 999] for place in range(0, len(text), 999)]
    make = lambda: PythonicCalls({"f"})  # noqa: E731
    assert short(parts_of(make, [text])) == short(parts_of(make, pieces)) == [("content", text)]
