"""Grammars of answers, enforced on a small vocabulary: what they let through is what the parsers read."""

from __future__ import annotations

from typing import Any

import llguidance
import pytest
import tokenizers
from answer_splits import parts_of, short

from lorafleet.workers.answers.call_syntax import CallSyntax, WrittenCall
from lorafleet.workers.answers.message import MessageReader
from lorafleet.workers.answers.parts import Part
from lorafleet.workers.answers.reasoning import REASONING_FORMATS, ReasoningParser
from lorafleet.workers.answers.tool_formats import PLAIN, TOOL_FORMATS, ToolFormat
from lorafleet.workers.grammars.answer_grammar import CallRules, answer_grammar
from lorafleet.workers.grammars.check import GrammarChecker
from lorafleet.workers.grammars.grammar_text import json_schema_grammar
from lorafleet.workers.text.tokenizer import Tokenizer

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"type": "string"}},
}
WRITTEN: dict[str, ToolFormat] = {
    name: form for name, form in (TOOL_FORMATS | {"plain": PLAIN}).items() if isinstance(form.syntax, CallSyntax)
}
MARKS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
SPECIAL = ["[TOOL_CALLS]", "<|tool_call|>", "<|/tool_call|>", "<|python_tag|>"]


@pytest.fixture(scope="module", params=["marks are tokens", "marks are text"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the quick brown fox"], trainer)
    if request.param == "marks are tokens":
        backend.add_tokens([tokenizers.AddedToken(mark, normalized=False) for mark in MARKS])
        backend.add_special_tokens([tokenizers.AddedToken(mark, normalized=False) for mark in SPECIAL])
    return Tokenizer(backend, special_tokens={"eos_token": "<eos>"})


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(tokenizer.to_json(), eos_token=[0])


@pytest.fixture(scope="module")
def checker() -> Any:
    checker = GrammarChecker()
    yield checker
    checker.close()


def rules(form: ToolFormat, *, takes_several: bool = True, schema: Any = CITY, is_strict: bool = False) -> CallRules:
    assert isinstance(form.syntax, CallSyntax)
    return CallRules(
        functions=[("get_weather", schema, is_strict), ('say "é"', None, False)],
        syntax=form.syntax,
        marks=(*form.begin, *form.end),
        takes_several=takes_several,
    )


class Enforced:
    """A grammar on a vocabulary."""

    def __init__(self, grammar: str, tokenizer: Tokenizer, vocabulary: llguidance.LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._start = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
        assert not self._start.is_error(), self._start.get_error()

    def allows(self, text: str) -> bool:
        """Return whether an answer may be this text and end there."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        matcher = self._start.deep_copy()
        return bool(matcher.validate_tokens(ids) == len(ids) and matcher.try_consume_tokens(ids) == len(ids)) and bool(
            matcher.is_accepting()
        )


@pytest.mark.parametrize("name", WRITTEN)
def test_calls_in_the_familys_form_are_allowed_and_nothing_else(
    name: str, tokenizer: Tokenizer, vocabulary: llguidance.LLTokenizer, checker: GrammarChecker
) -> None:
    form = WRITTEN[name]
    grammar = checker.checked(answer_grammar(calls=rules(form), token_of=tokenizer.added_id))
    enforced = Enforced(grammar, tokenizer, vocabulary)
    syntax = form.syntax
    one = syntax.text([WrittenCall("get_weather", {"city": "Paris"})])
    two = syntax.text([WrittenCall("get_weather", {"city": "x"}), WrittenCall('say "é"', {})])
    assert enforced.allows(one) and enforced.allows(two)
    for text in (
        "",
        "hello",
        f"{one}!",
        f"a{one}",
        syntax.text([WrittenCall("get_weather", {"town": "x"})]),
        syntax.text([WrittenCall("get_weather", {"city": 3})]),
        syntax.text([WrittenCall("other", {})]),
        syntax.text([WrittenCall('say "é"', {"a": 1})]),
    ):
        assert not enforced.allows(text), text
    single = answer_grammar(calls=rules(form, takes_several=False), token_of=tokenizer.added_id)
    enforced = Enforced(single, tokenizer, vocabulary)
    assert enforced.allows(one) and not enforced.allows(two)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_the_grammar_makes_is_read_as_calls(
    name: str, tokenizer: Tokenizer, vocabulary: llguidance.LLTokenizer
) -> None:
    form = WRITTEN[name]
    matcher = llguidance.LLMatcher(
        vocabulary, answer_grammar(calls=rules(form, takes_several=False), token_of=tokenizer.added_id), log_level=0
    )
    ids: list[int] = []
    while not matcher.is_stopped() and len(ids) < 400:  # the allowed token that is furthest on in the vocabulary
        mask = matcher.compute_bitmask()
        allowed = [i for i in range(tokenizer.vocab_size) if mask[i // 8] >> (i % 8) & 1]
        closing = [i for i in allowed if tokenizer.decode([i], skip_special_tokens=False) in ('"', "}", "]")]
        ids.append(0 if 0 in allowed else (closing or allowed)[-1])
        matcher.consume_token(ids[-1])
    text = tokenizer.decode([i for i in ids if i], skip_special_tokens=False)
    (call,) = short(parts_of(lambda: form.parser({"get_weather", 'say "é"'}), [text]))
    assert call[0] == "call" and call[1] in ("get_weather", 'say "é"'), text


@pytest.mark.parametrize(
    ("parser", "is_open", "good", "bad"),
    [
        (
            "qwen3",
            None,
            ["<think>hm</think>\n\nCALL", "<think></think>CALL", "CALL"],
            ["hm</think>CALL", "<think>CALL"],
        ),
        ("qwen3", True, ["hm</think>CALL", "</think>\nCALL", "<think>hm</think>CALL"], ["CALL"]),
        ("qwen3", False, ["CALL"], ["<think>hm</think>CALL", "hm</think>CALL"]),
        ("deepseek_r1", None, ["hm</think>CALL", "<think>hm</think>CALL"], ["CALL"]),
        (
            "granite",
            None,
            ["CALL", "Here is my thought process: hm Here's my response:\nCALL"],
            ["hm Here is my response: CALL"],
        ),
    ],
)
def test_reasoning_may_precede_calls_as_the_prompt_has_it(
    parser: str,
    is_open: bool | None,
    good: list[str],
    bad: list[str],
    tokenizer: Tokenizer,
    vocabulary: llguidance.LLTokenizer,
    checker: GrammarChecker,
) -> None:
    form, reasoning = WRITTEN["hermes"], REASONING_FORMATS[parser]
    call = form.syntax.text([WrittenCall("get_weather", {"city": "Paris"})])
    grammar = answer_grammar(calls=rules(form), reasoning=reasoning, is_open=is_open, token_of=tokenizer.added_id)
    enforced = Enforced(checker.checked(grammar), tokenizer, vocabulary)
    for text in good:
        text = text.replace("CALL", call)
        assert enforced.allows(text), text
        reader = MessageReader(reasoning=ReasoningParser(reasoning, is_open=is_open), calls=form.parser(()))
        parts: list[Part] = reader.push(text, is_last=True)
        assert short(parts)[-1] == ("call", "get_weather", '{"city": "Paris"}')
    assert not any(enforced.allows(text.replace("CALL", call)) for text in bad)


def test_content_in_its_own_grammar_may_stand_in_place_of_calls(
    tokenizer: Tokenizer, vocabulary: llguidance.LLTokenizer, checker: GrammarChecker
) -> None:
    form = WRITTEN["hermes"]
    content = json_schema_grammar({"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}})
    grammar = answer_grammar(content=content, calls=rules(form), token_of=tokenizer.added_id)
    enforced = Enforced(checker.checked(grammar), tokenizer, vocabulary)
    assert enforced.allows('{"a": 1}')
    assert enforced.allows(form.syntax.text([WrittenCall("get_weather", {"city": "x"})]))
    assert not enforced.allows('{"b": 1}') and not enforced.allows("text")


def test_content_in_its_own_grammar_may_follow_reasoning(
    tokenizer: Tokenizer, vocabulary: llguidance.LLTokenizer, checker: GrammarChecker
) -> None:
    grammar = answer_grammar(
        content='start: "yes" | WORD\nWORD: /n[o]+/', reasoning=REASONING_FORMATS["qwen3"], token_of=tokenizer.added_id
    )
    enforced = Enforced(checker.checked(grammar), tokenizer, vocabulary)
    assert enforced.allows("yes") and enforced.allows("<think>maybe</think>\n\nnooo")
    assert not enforced.allows("maybe")


@pytest.mark.parametrize(
    ("schema", "allowed"),
    [
        ({"properties": {"a": {}}}, False),
        ({"properties": {"a": {}}, "additionalProperties": True}, True),
        ({"type": "object", "allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, True),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"a": {}}}}}, True),
        ({}, False),
    ],
)
def test_a_function_has_only_the_arguments_that_its_schema_describes(
    schema: dict[str, Any], allowed: bool, tokenizer: Tokenizer, vocabulary: llguidance.LLTokenizer
) -> None:
    form = WRITTEN["hermes"]
    grammar = answer_grammar(calls=rules(form, schema=schema), token_of=tokenizer.added_id)
    text = form.syntax.text([WrittenCall("get_weather", {"b": 1})])
    assert Enforced(grammar, tokenizer, vocabulary).allows(text) is allowed


def test_a_strict_function_refuses_a_schema_that_cannot_be_enforced(checker: GrammarChecker) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    checker.checked(answer_grammar(calls=rules(WRITTEN["hermes"], schema=schema)), param="tools")
    with pytest.raises(Exception, match="tools "):
        checker.checked(answer_grammar(calls=rules(WRITTEN["hermes"], schema=schema, is_strict=True)), param="tools")
