"""Mistral's two forms of calls."""

from __future__ import annotations

import pytest
from answer_splits import told

from lorafleet.workers.answers.mistral_calls import MistralCalls

CASES = {
    "a list": (
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
        [("call", "f", '{"a": 1}'), ("call", "g", "{}")],
    ),
    "a name and arguments": ('ok[TOOL_CALLS]f{"a": {"b": []}}', [("content", "ok"), ("call", "f", '{"a": {"b": []}}')]),
    "marks of arguments and id": (
        '[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g.h-1[CALL_ID]abc123def[ARGS]{"x": "{"} ',
        [("call", "f", "{}"), ("call", "g.h-1", '{"x": "{"}')],
    ),
    "a mistake in the arguments": ('[TOOL_CALLS]f{"a": nope} x', [("call", "f", '{"a": nope} x')]),
    "broken off": ('[TOOL_CALLS]f{"a": [1', [("call", "f", '{"a": [1')]),
    "a sentence": ("[TOOL_CALLS]what is this", [("content", "[TOOL_CALLS]what is this")]),
    "a sentence with a brace": ("[TOOL_CALLS]no call {}", [("content", "[TOOL_CALLS]no call {}")]),
    "no mark": ('f{"a": 1}', [("content", 'f{"a": 1}')]),
}


@pytest.mark.parametrize("name", CASES)
def test_calls_are_the_same_however_the_text_is_split(name: str) -> None:
    text, parts = CASES[name]
    assert told(MistralCalls, text) == parts


def test_a_name_that_never_ends_is_content() -> None:
    text = "[TOOL_CALLS]" + "f" * 10_000
    parser = MistralCalls()
    assert "".join(part.text for part in parser.push(text) + parser.finish()) == text  # type: ignore[union-attr]
