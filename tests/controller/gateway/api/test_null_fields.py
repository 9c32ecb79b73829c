"""Fields that clients read as attributes are there, null if nothing fills them."""

from __future__ import annotations

from typing import Any

import pytest

from lorafleet.controller.gateway.api.null_fields import with_nulls

HI = [{"role": "user", "content": "hello"}]


def test_values_stay_and_the_rest_is_null() -> None:
    assert with_nulls({"a": 1, "b": None}, ("b", "a", "c")) == {"a": 1, "b": None, "c": None}


async def test_a_chat_has_them(fleet: Any) -> None:
    answer = await fleet.openai.chat.completions.create(model="tiny", messages=HI, max_tokens=2)
    for name in ("prompt_logprobs", "prompt_token_ids", "service_tier", "system_fingerprint", "kv_transfer_params"):
        assert getattr(answer, name) is None
    choice = answer.choices[0]
    assert (choice.token_ids, choice.stop_reason, choice.logprobs) == (None, None, None)
    message = choice.message
    assert message.content
    for name in ("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning", "reasoning_content"):
        assert getattr(message, name) is None


async def test_a_completion_has_them(fleet: Any) -> None:
    answer = await fleet.openai.completions.create(model="tiny", prompt="hello", max_tokens=2)
    for name in ("service_tier", "system_fingerprint", "kv_transfer_params"):
        assert getattr(answer, name) is None
    for name in ("token_ids", "stop_reason", "logprobs", "prompt_logprobs", "prompt_token_ids"):
        assert getattr(answer.choices[0], name) is None


@pytest.mark.parametrize("logprobs", [False, True])
async def test_every_chunk_has_them(fleet: Any, logprobs: bool) -> None:
    chat = await fleet.openai.chat.completions.create(
        model="tiny", messages=HI, max_tokens=3, stream=True, logprobs=logprobs
    )
    text = await fleet.openai.completions.create(
        model="tiny", prompt="hello", max_tokens=3, stream=True, logprobs=1 if logprobs else None
    )
    for stream in (chat, text):
        chunks = [chunk async for chunk in stream]
        assert len(chunks) >= 3
        for chunk in chunks:
            assert (chunk.prompt_token_ids, chunk.system_fingerprint) == (None, None)
            choice = chunk.choices[0]
            assert (choice.token_ids, choice.stop_reason) == (None, None)
            assert {"logprobs", "finish_reason"} <= choice.model_fields_set
