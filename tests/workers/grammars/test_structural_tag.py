"""Structural tags let text go free and hold what stands between tags to its grammar."""

from __future__ import annotations

import json
from typing import Any

import pytest
from byte_grammar import accepts

from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.grammars.structural_tag import structural_tag_grammar

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
OLD = {
    "structures": [
        {"begin": "<f=get>", "schema": CITY, "end": "</f>"},
        {"begin": "<f=put>", "schema": {"type": "integer"}, "end": "</f>"},
    ],
    "triggers": ["<f="],
}
TEXT = {"type": "any_text"}
YES = {"type": "const_string", "value": "yes"}


def tag(begin: str, content: dict[str, Any], end: str) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


INTEGER = {"type": "json_schema", "json_schema": {"type": "integer"}}
A, B = tag("<a>", INTEGER, "</a>"), tag("<b>", TEXT, "</b>")
TAGS = {"type": "triggered_tags", "triggers": ["<a", "<b"], "tags": [A, B]}
MANY = {"type": "tags_with_separator", "tags": [A], "separator": ","}

# (structural tag, accepted, not accepted)
CASES: dict[str, tuple[Any, list[str], list[str]]] = {
    "old": (
        OLD,
        ["", "free text < f", '<f=get>{"city":"x"}</f>', "a <f=put>5</f> b <f=put>6</f>"],
        ["<f=put>x</f>", "<f=other>", "<f=get>{}</f>", "<f=put>5"],
    ),
    "old as text": (json.dumps(OLD), ["<f=put>5</f>"], ["<f=put>x</f>"]),
    "triggered": ({"format": TAGS}, ["x<a>1</a>y<b>any\n<thing></b>", "x"], ["<a>x</a>", "<ab>"]),
    "at least one": ({"format": TAGS | {"at_least_one": True}}, ["x <a>1</a>"], ["x", ""]),
    "after the first": (
        {"format": TAGS | {"at_least_one": True, "stop_after_first": True}},
        ["<a>1</a>"],
        ["<a>1</a>x", "x"],
    ),
    "separated": ({"format": MANY}, ["", "<a>1</a>", "<a>1</a>,<a>2</a>"], ["<a>1</a><a>2</a>", "x"]),
    "one separated": ({"format": MANY | {"at_least_one": True, "stop_after_first": True}}, ["<a>1</a>"], ["", "x"]),
    "sequence": (
        {"format": {"type": "sequence", "elements": [YES, {"type": "regex", "pattern": "[0-9]+"}]}},
        ["yes12"],
        ["yes", "12"],
    ),
    "or": ({"format": {"type": "or", "elements": [YES, A]}}, ["yes", "<a>1</a>"], ["", "yes<a>1</a>"]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_stands_between_tags_follows_its_grammar(case: str) -> None:
    structural_tag, accepted, refused = CASES[case]
    grammar = structural_tag_grammar(structural_tag)
    assert [text for text in accepted if not accepts(grammar, text)] == []
    assert [text for text in refused if accepts(grammar, text)] == []


def deep(depth: int) -> dict[str, Any]:
    part: dict[str, Any] = YES
    for _ in range(depth):
        part = {"type": "or", "elements": [part]}
    return part


@pytest.mark.parametrize(
    ("structural_tag", "message"),
    [
        ("{", "not valid JSON"),
        (5, "give an object"),
        ({}, "structures None"),
        ({"structures": [{}], "triggers": ["<"]}, "begin None"),
        ({"structures": OLD["structures"], "triggers": "<f="}, "triggers '<f='"),
        ({"structures": OLD["structures"], "triggers": ["<g"]}, "trigger '<g', with which no tag begins"),
        ({"structures": OLD["structures"], "triggers": ["<f=get"]}, "'<f=put>', which begins with no trigger"),
        ({"structures": [{"begin": "<f", "schema": 5, "end": ""}], "triggers": ["<f"]}, "JSON schema is 5"),
        ({"format": None}, "the type None"),
        ({"format": {"type": "poem"}}, "the type 'poem'"),
        ({"format": {"type": []}}, r"the type \[\]"),
        ({"format": tag("<a>", TEXT, "")}, "no end"),
        ({"format": {"type": "sequence", "elements": []}}, "elements"),
        ({"format": deep(17)}, "nested over 16 deep"),
        ({"format": {"type": "or", "elements": [YES] * 1025}}, "over 1024 parts"),
    ],
)
def test_what_is_no_structural_tag_is_named(structural_tag: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        structural_tag_grammar(structural_tag)
