"""Reasoning in front of answers."""

from __future__ import annotations

import pytest
from answer_splits import told

from lorafleet.workers.answers.reasoning import REASONING_FORMATS, ReasoningParser

CASES = {
    "marked": ("qwen3", None, "<think>\nhm\n</think>\n\nYes ", [("reasoning", "hm"), ("content", "Yes ")]),
    "blanks first": ("qwen3", None, "\n <think>hm</think>Yes", [("reasoning", "hm"), ("content", "Yes")]),
    "no reasoning": ("qwen3", None, " \nYes <think>", [("content", " \nYes <think>")]),
    "empty reasoning": ("qwen3", None, "<think>\n\n</think>\n\nYes", [("content", "Yes")]),
    "never closed": ("qwen3", None, "<think>hm </thi ", [("reasoning", "hm </thi")]),
    "a part of a mark": ("qwen3", None, "<thin", [("content", "<thin")]),
    "opened by the prompt": ("qwen3", True, "hm</think>Yes", [("reasoning", "hm"), ("content", "Yes")]),
    "opened twice": ("qwen3", True, "<think>\nhm</think>Yes", [("reasoning", "hm"), ("content", "Yes")]),
    "closed by the prompt": ("deepseek_r1", False, "\n\nYes </think>", [("content", "Yes </think>")]),
    "implied": ("deepseek_r1", None, "\nhm\n</think>\nYes", [("reasoning", "hm"), ("content", "Yes")]),
    "implied and never closed": ("deepseek_r1", None, "hm", [("reasoning", "hm")]),
    "sentences": (
        "granite",
        None,
        "Here is my thought process: hm Here is my response: Yes",
        [("reasoning", "hm"), ("content", "Yes")],
    ),
    "other sentences": (
        "granite",
        None,
        "Here's my thought process:\nhm\nHere's my response:\nYes",
        [("reasoning", "hm"), ("content", "Yes")],
    ),
    "mistral's": ("mistral", None, "[THINK]hm[/THINK]Yes", [("reasoning", "hm"), ("content", "Yes")]),
    "ended by a call": ("qwen3", None, "<think>hm\n<tool_call>x", [("reasoning", "hm"), ("content", "<tool_call>x")]),
    "nothing": ("qwen3", None, "", []),
}


@pytest.mark.parametrize("name", CASES)
def test_reasoning_is_the_same_however_the_text_is_split(name: str) -> None:
    parser, is_open, text, parts = CASES[name]

    def make() -> ReasoningParser:
        return ReasoningParser(REASONING_FORMATS[parser], is_open=is_open, also_ends=("<tool_call>",))

    assert told(make, text) == parts


@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("user: <think> is a mark<|im_end|>\nassistant:", None),
    ],
)
def test_a_prompts_end_says_whether_reasoning_is_open(prompt: str, is_open: bool | None) -> None:
    assert REASONING_FORMATS["qwen3"].is_open(prompt) is is_open
