"""Profiles in files of models and adapters."""

from __future__ import annotations

import pytest

from lorafleet.workers.answers.profile import Profile, read_profile
from lorafleet.workers.errors import ModelError


def test_a_profile_has_a_default_for_structured_output() -> None:
    assert read_profile(b'{"structured_outputs": {"regex": "a+"}}').structured_outputs == {"regex": "a+"}


def test_a_profile_names_parsers() -> None:
    data = b'{"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}'
    assert read_profile(data) == Profile("hermes", "qwen3")
    assert read_profile(b'{"tool_call_parser": null}') == read_profile(b"{}") == Profile()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "must be an object"),
        (b'{"tool_parser": "hermes"}', "has 'tool_parser'; it may have reasoning_parser, structured_outputs, tool_"),
        (b'{"tool_call_parser": "herms"}', "is 'herms'; it must be one of gemma"),
        (b'{"structured_outputs": "json"}', "is 'json'; it must be an object"),
        (b'{"reasoning_parser": 3}', "is 3; it must be one of deepseek_r1"),
    ],
)
def test_a_mistake_is_named(data: bytes, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_profile(data)
