"""What callers ask for as a grammar text: it accepts what they mean, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from byte_grammar import accepts

from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.grammars.grammar_text import (
    MAX_CHOICES,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)

ODD = ['"', "\\", "\n", "\x7f", "\u2028", "é😀", "/x/", "\x00"]
NAMED = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
OPEN = NAMED | {"additionalProperties": True}
OPTIONS = NAMED | {"x-guidance": {"whitespace_flexible": False}}
FORMAT = {"properties": {"format": {"const": 1}}}

# (grammar, accepted, not accepted)
CASES: dict[str, tuple[str, list[str], list[str]]] = {
    "schema": (json_schema_grammar(NAMED), ['{"a":1}', '{ "a" :\n1, "b": [] }'], ["{}", '{"a":"1"}', "[]", ""]),
    "schema as text": (json_schema_grammar(json.dumps(NAMED)), ['{"a":1}'], ["{}"]),
    "no blanks": (json_schema_grammar(NAMED, whitespace=""), ['{"a":1}'], ['{"a": 1}']),
    "own blanks": (json_schema_grammar(NAMED, whitespace="_{1,2}"), ['{"a":__1}'], ['{"a": 1}']),
    "endless blanks": (json_schema_grammar(NAMED), ['{"a":' + " " * 64 + "1}"], ['{"a":' + " " * 65 + "1}"]),
    "closed": (json_schema_grammar(NAMED, allows_more_properties=False), ['{"a":1}'], ['{"a":1,"b":2}']),
    "left open": (json_schema_grammar(OPEN, allows_more_properties=False), ['{"a":1,"b":2}'], []),
    "anything": (json_schema_grammar(True), ["1", '"a"', "[{}]", "null"], ["a", ""]),
    "an unknown format": (json_schema_grammar({"type": "string", "format": "regex"}), ['"a"'], ["a"]),
    "a known format": (json_schema_grammar({"type": "string", "format": "date"}), ['"2026-11-30"'], ['"today"']),
    "a property called format": (json_schema_grammar(FORMAT), ['{"format":1}'], ['{"format":2}']),
    "data with a format": (json_schema_grammar({"const": {"format": "x"}}), ['{"format":"x"}'], ["{}"]),
    "the compiler's options": (json_schema_grammar(OPTIONS), ['{"a": 1}'], []),
    "lenient": (json_schema_grammar({"type": "array", "uniqueItems": True}, is_strict=False), ["[1,1]"], ["{}"]),
    "object": (json_object_grammar(), ["{}", '{"a":{"b":null}}'], ["[]", "1"]),
    "regex": (regex_grammar(r"[a-c]+/\d{2}"), ["ab/12"], ["ab/1", "ab/123", "x/12"]),
    "regex with anchors": (regex_grammar(r"^a|b$"), ["a", "b"], ["ab", "^a"]),
    "regex that ends with a dollar": (regex_grammar(r"a\$"), ["a$"], ["a"]),
    "regex with a newline": (regex_grammar("a\nb"), ["a\nb"], ["ab"]),
    "regex with a slash": (regex_grammar(r"a\/b"), ["a/b"], [r"a\/b"]),
    "choices": (choice_grammar(["yes", "no", "no"]), ["yes", "no"], ["maybe", "", "yesno"]),
    "odd choices": (choice_grammar(ODD), ODD, ["n", "x"]),
    "Lark": (lark_grammar('start: "a" b\nb: "b"*'), ["a", "abb"], ["b"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_grammar_accepts_what_was_meant(case: str) -> None:
    grammar, accepted, refused = CASES[case]
    assert [text for text in accepted if not accepts(grammar, text)] == []
    assert [text for text in refused if accepts(grammar, text)] == []


def deep(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: json_schema_grammar("{", param="x"), "x: the JSON schema is not valid JSON"),
        (lambda: json_schema_grammar("[" * 100_000), "not valid JSON"),
        (lambda: json_schema_grammar("[]"), "must be an object"),
        (lambda: json_schema_grammar(5), "must be an object"),  # type: ignore[arg-type]
        (lambda: json_schema_grammar(deep(65)), "nested over 64 deep"),
        (lambda: regex_grammar(""), "give a text"),
        (lambda: regex_grammar(5), "give a text"),  # type: ignore[arg-type]
        (lambda: choice_grammar([]), "give a list of texts"),
        (lambda: choice_grammar("yes"), "give a list of texts"),
        (lambda: choice_grammar([""]), "give a text"),
        (lambda: choice_grammar([5]), "the choice 5"),  # type: ignore[list-item]
        (lambda: choice_grammar(["a"] * (MAX_CHOICES + 1)), f"the limit is {MAX_CHOICES}"),
        (lambda: lark_grammar(" "), "give a text"),
    ],
)
def test_what_is_no_grammar_is_named(make: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        make()
