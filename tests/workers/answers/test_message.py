"""Reasoning, content and calls together."""

from __future__ import annotations

import pytest
from answer_splits import parts_of, short, splits

from lorafleet.workers.answers.message import MessageReader
from lorafleet.workers.answers.parts import CallArguments, CallStart, Content, Part, Reasoning, joined
from lorafleet.workers.answers.reasoning import REASONING_FORMATS, ReasoningParser
from lorafleet.workers.answers.tool_formats import HERMES

TEXT = '<think>hm</think>\nOn it.\n<tool_call>{"name":"f","arguments":{"a":1}}</tool_call><tool_call>{"name":"g"}'


class Reader:
    """A message's reader as a parser."""

    def __init__(self, **options: object) -> None:
        reasoning = ReasoningParser(REASONING_FORMATS["qwen3"], also_ends=HERMES.begin)
        self._reader = MessageReader(reasoning=reasoning, calls=HERMES.parser(()), **options)  # type: ignore[arg-type]

    def push(self, text: str) -> list[Part]:
        return self._reader.push(text)

    def finish(self) -> list[Part]:
        return self._reader.push("", is_last=True)


def test_all_parts_come_in_order_however_the_text_is_split() -> None:
    whole = parts_of(Reader, [TEXT])
    assert short(whole) == [("reasoning", "hm"), ("content", "On it."), ("call", "f", '{"a":1}'), ("call", "g", "{}")]
    for pieces in list(splits(TEXT))[::17]:
        assert parts_of(Reader, pieces) == whole


def test_calls_beyond_the_limit_are_left_out() -> None:
    parts = short(parts_of(lambda: Reader(max_calls=1), [TEXT + "</tool_call> end"]))
    assert parts[1:] == [("content", "On it."), ("call", "f", '{"a":1}'), ("content", "end")]


def test_reasoning_can_be_left_out() -> None:
    assert short(parts_of(lambda: Reader(shows_reasoning=False), [TEXT]))[0] == ("content", "On it.")


@pytest.mark.parametrize("is_last", [True, False])
def test_without_parsers_all_is_content(is_last: bool) -> None:
    assert MessageReader().push("<think> {", is_last=is_last) == [Content("<think> {")]
    assert MessageReader().push("", is_last=is_last) == []


def test_neighbours_of_one_kind_are_joined_but_calls() -> None:
    parts: list[Part] = [
        Reasoning("a"),
        Reasoning("b"),
        Content("c"),
        CallStart("f"),
        CallStart("g"),
        CallArguments("1"),
    ]
    assert joined([*parts, CallArguments("2")]) == [
        Reasoning("ab"),
        Content("c"),
        CallStart("f"),
        CallStart("g"),
        CallArguments("12"),
    ]
