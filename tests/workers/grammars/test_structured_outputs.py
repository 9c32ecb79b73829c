"""`StructuredOutputsParams` takes exactly one kind of structured output."""

from __future__ import annotations

from typing import Any

import pytest

from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.grammars.structured_outputs import StructuredOutputsParams


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"json": {"type": "null"}}, '"null"'),
        ({"json": False}, '"not"'),
        ({"json_object": True}, '"object"'),
        ({"regex": "[ab]"}, "/[ab]/"),
        ({"choice": ["a"]}, '"a"'),
        ({"grammar": "root ::= [a]"}, "root"),
    ],
)
def test_each_kind_has_a_grammar(fields: dict[str, Any], part: str) -> None:
    assert part in StructuredOutputsParams(**fields).grammar_text()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "asks for nothing"),
        ({"json_object": False}, "asks for nothing"),
        ({"json": {}, "regex": "a"}, "has json and regex"),
        ({"json": {}, "whitespace_pattern": 5}, "whitespace_pattern is 5"),
    ],
)
def test_other_numbers_of_kinds_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        StructuredOutputsParams(**fields)
