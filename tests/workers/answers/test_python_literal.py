"""The reference is Python's own parser."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from lorafleet.workers.answers.python_literal import LiteralReader

GOOD = [
    *("1", "-2", "+3", "1_000", "2.5", "-.5", "1e3", "1.", "True", "False", "None"),
    *("''", "'a'", '"b"', "'it\\'s'", '"\\n\\t\\\\"', "'\\x41\\u00e9'", "'日本'", "'[(\"'"),
    *("[]", "[1, 2,]", "(1, 'a')", "{}", "{'a': 1, \"b\": [None]}", "{'a': {'b': ()}}", " [ 1 ,2 ] "),
]


@pytest.mark.parametrize("text", GOOD)
def test_literals_are_pythons(text: str) -> None:
    expected = ast.literal_eval(text.strip())
    value = LiteralReader(text).value()
    assert value == (list(expected) if isinstance(expected, tuple) else _without_tuples(expected))


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_tuples(item) for key, item in value.items()}
    return [_without_tuples(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "f()",
        "'a",
        "[1",
        "[1 2]",
        "{1: 2}",
        "{'a'}",
        "{'a' 1}",
        "1e999",
        "9" * 5000,
        "-",
        "'\\ud800'",
        "[" * 70,
    ],
)
def test_all_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        LiteralReader(text).value()


def test_keywords_are_names_and_literals() -> None:
    assert LiteralReader(" a = 1, b='x', ").keywords() == {"a": 1, "b": "x"}
    assert LiteralReader("  ").keywords() == {}
    for text in ("1", "a", "a=", "a=1 b=2", "a=1,,b=2", "'a'=1"):
        with pytest.raises(ValueError):
            LiteralReader(text).keywords()


def test_jsons_constants_are_known_too() -> None:
    assert LiteralReader("[true, false, null]").value() == [True, False, None]
