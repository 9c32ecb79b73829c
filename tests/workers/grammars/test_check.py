"""Grammars are checked in processes of their own, and what explodes hits a bound."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.grammars.check import GrammarChecker
from lorafleet.workers.grammars.grammar_text import json_schema_grammar, regex_grammar
from lorafleet.workers.scheduling.sampling_options import MAX_GRAMMAR_CHARS


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    checker = GrammarChecker()
    yield checker
    checker.close()


def chain(link: str, last: str, length: int = 8000) -> str:
    return "\n".join([*(link.format(i, i + 1) for i in range(length)), last.format(length)])


CIRCLE = {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}], "type": "object"}}, "$ref": "#/$defs/a"}
PRODUCT = [{"anyOf": [{"properties": {f"p{i}": {"pattern": f"a{j}"}}} for j in range(8)]} for i in range(10)]
NESTED = {f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(2000)} | {"a2000": {}}
PATTERNS = [{"type": "string", "pattern": f".*{chr(97 + i % 26)}.{{{i}}}x.*"} for i in range(60)]

NOT_ENFORCED = {
    "not a regular expression": (regex_grammar("(a"), "unclosed group"),
    "look-around": (regex_grammar("(?=a)b"), "look-around"),
    "a back reference": (regex_grammar(r"(a)\1"), "backreferences"),
    "an unknown type": (json_schema_grammar({"type": "strin"}), "Invalid type: strin"),
    "a keyword that is not enforced": (json_schema_grammar({"uniqueItems": True}), "uniqueItems"),
    "no value": (json_schema_grammar({"type": "integer", "minimum": 5, "maximum": 2}), "Unsatisfiable"),
    "a reference to elsewhere": (json_schema_grammar({"$ref": "http://example.com/x"}), "example.com"),
    "a circle": (json_schema_grammar(CIRCLE), "circular"),
    "an unknown rule": ("start: foo", 'unknown name: "foo"'),
    "no grammar": ("hello", "neither Lark nor GBNF"),
    "brackets": ("start: " + "(" * 3000 + '"a"' + ")" * 3000, "nested"),
    "GBNF brackets": ("root ::= " + "(" * 3000 + '"a"' + ")" * 3000, "nested"),
    "a product of choices": (json_schema_grammar({"allOf": PRODUCT}), "too large"),
    "an unpaired surrogate": ('start: "\ud800"', "surrogate"),
}

EXPLODES = {
    "rules that go deep": chain("r{}: r{}", 'r{}: "a"\nstart: r0'),
    "terms that go deep": chain('A{}: "x" A{}', 'A{}: "a"\nstart: A0'),
    "references that go deep": json_schema_grammar({"$defs": NESTED, "$ref": "#/$defs/a0"}),
    "patterns that take memory": json_schema_grammar({"allOf": PATTERNS}),
    "patterns that take time": json_schema_grammar(
        {"patternProperties": {f"^a{i}.*b{i}$": {"type": "string"} for i in range(1000)}}
    ),
}


@pytest.mark.parametrize("case", NOT_ENFORCED)
def test_what_cannot_be_enforced_is_named(checker: GrammarChecker, case: str) -> None:
    grammar, named = NOT_ENFORCED[case]
    with pytest.raises(InvalidRequestError) as refused:
        checker.checked(grammar, param="guided_json")
    assert named in refused.value.message and refused.value.message.startswith("guided_json")
    assert refused.value.param == "guided_json" and len(refused.value.message) < 300


@pytest.mark.parametrize("case", EXPLODES)
def test_what_explodes_hits_a_bound_and_the_next_is_checked(checker: GrammarChecker, case: str) -> None:
    with pytest.raises(InvalidRequestError, match="too complex"):
        checker.checked(EXPLODES[case])
    assert checker.checked("start: /a+/") == "start: /a+/"


def test_a_verdict_is_remembered(checker: GrammarChecker) -> None:
    assert not checker.knows("start: /b+/")
    checker.checked("start: /b+/")
    assert checker.knows("start: /b+/")
    with pytest.raises(InvalidRequestError):
        checker.checked("start: nothing", param="one")
    with pytest.raises(InvalidRequestError, match=r"^another "):
        checker.checked("start: nothing", param="another")


def test_gbnf_becomes_lark(checker: GrammarChecker) -> None:
    lark = checker.checked('root ::= "yes" | no-way\nno-way ::= "no" [0-9]{1,3}')
    assert "start: " in lark and "::=" not in lark
    assert checker.checked(lark) == lark


def test_a_grammar_over_the_limit_is_not_looked_at(checker: GrammarChecker) -> None:
    with pytest.raises(InvalidRequestError, match=f"the limit is {MAX_GRAMMAR_CHARS}"):
        checker.checked("start: " + '"a" ' * MAX_GRAMMAR_CHARS)


def test_a_closed_checker_leaves_no_process() -> None:
    checker = GrammarChecker()
    checker.checked("start: /a/")
    (process,) = checker._idle
    checker.close()
    assert process._process.returncode is not None
