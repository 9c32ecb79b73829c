"""POST /v1/chat/completions, with the openai package."""

from __future__ import annotations

import json
from typing import Any

import pytest

HI = [{"role": "user", "content": "hello"}]


@pytest.fixture
def answering(fleet: Any, tokenizer: Any) -> Any:
    """A fleet whose worker says "hello world!" and then EOS."""
    fleet.worker.answer = [*tokenizer.encode("hello world!"), fleet.worker.eos]
    return fleet


async def test_messages_go_through_the_template_without_further_special_tokens(answering: Any, tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "be quick"}, *HI]
    answer = await answering.openai.chat.completions.create(model="tiny", messages=messages)
    prompt = tokenizer.decode(list(answering.worker.generates[0].prompt_token_ids), skip_special_tokens=False)
    assert prompt == (
        "<|im_start|>system\nbe quick<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", "hello world!")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.usage.completion_tokens == len(answering.worker.answer)


async def test_max_tokens_is_the_rest_of_the_context_unless_given(answering: Any) -> None:
    await answering.openai.chat.completions.create(model="tiny", messages=HI)
    await answering.openai.chat.completions.create(model="tiny", messages=HI, max_completion_tokens=3)
    await answering.openai.chat.completions.create(model="tiny", messages=HI, max_tokens=4)
    first, second, third = answering.worker.generates
    assert first.sampling.max_tokens == 64 - len(first.prompt_token_ids)
    assert (second.sampling.max_tokens, third.sampling.max_tokens) == (3, 4)


async def test_a_stream_begins_with_the_role_and_ends_with_the_reason(answering: Any) -> None:
    stream = await answering.openai.chat.completions.create(
        model="org/pirate", messages=HI, stream=True, n=2, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert [(choice.index, choice.delta.role) for choice in choices[:2]] == [(0, "assistant"), (1, "assistant")]
    assert all(choice.delta.role is None for choice in choices[2:])
    for index in range(2):
        own = [choice for choice in choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in own) == "hello world!"
        assert [choice.finish_reason for choice in own if choice.finish_reason] == ["stop"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk.model for chunk in chunks} == {"org/pirate"}
    assert chunks[-1].usage.completion_tokens == 2 * len(answering.worker.answer)


async def test_content_parts_are_joined(answering: Any, tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "the quick"}, {"type": "text", "text": "brown fox"}]
    await answering.openai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}])
    prompt = tokenizer.decode(list(answering.worker.generates[0].prompt_token_ids))
    assert "the quick\nbrown fox" in prompt


@pytest.mark.parametrize("num_top", [0, 3])
async def test_logprobs_have_the_shape_of_openais(answering: Any, tokenizer: Any, num_top: int) -> None:
    ids = tokenizer.encode("日")
    answering.worker.answer = [*tokenizer.encode("hello "), *ids, answering.worker.eos]
    options = {"model": "tiny", "messages": HI, "logprobs": True, "top_logprobs": num_top}
    answer = await answering.openai.chat.completions.create(**options)
    content = answer.choices[0].logprobs.content
    assert len(content) == len(answering.worker.answer)
    assert b"".join(bytes(entry.bytes) for entry in content[:-1]).decode() == "hello 日"
    assert content[-2].token.startswith("\\x")
    assert {entry.logprob for entry in content} == {-0.5}
    assert {len(entry.top_logprobs) for entry in content} == {num_top}
    streamed = [
        entry
        async for chunk in await answering.openai.chat.completions.create(**options, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == content


async def test_without_logprobs_the_field_is_null(answering: Any) -> None:
    _, answer = await answering.post("/v1/chat/completions", {"model": "tiny", "messages": HI})
    assert answer["choices"][0]["logprobs"] is None


async def test_fields_that_ask_for_nothing_are_accepted(answering: Any) -> None:
    body = {
        "model": "tiny",
        "messages": HI,
        "user": "someone",
        "metadata": {"a": {"b": [1]}},
        "store": False,
        "service_tier": "auto",
        "tools": None,
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "stop": None,
        "temperature": None,
        "parallel_tool_calls": True,
        "no_such_field": None,
    }
    status, answer = await answering.post("/v1/chat/completions", body)
    assert status == 200, answer


async def test_a_request_id_is_taken_over_if_it_is_a_plain_word(answering: Any) -> None:
    for given, taken in (("abc-1.2:3", True), ("a b", False), ("x" * 129, False)):
        async with answering.http.post(
            "/v1/chat/completions", json={"model": "tiny", "messages": HI}, headers={"x-request-id": given}
        ) as response:
            assert (response.headers["x-request-id"] == given) == taken
            request_id = response.headers["x-request-id"]
            assert (await response.json())["id"] == f"chatcmpl-{request_id}"
        assert answering.worker.generates[-1].request_id == request_id


async def test_text_is_json_however_odd_it_is(answering: Any, tokenizer: Any) -> None:
    text = 'a "quoted" \\ line\nbreak \x7f and </script> \u2028'
    answering.worker.answer = [*tokenizer.encode(text), answering.worker.eos]
    async with answering.http.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": HI, "stream": True}
    ) as response:
        events = (await response.text()).split("\n\n")[:-2]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
