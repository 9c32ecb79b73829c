"""Reasoning over HTTP, and what says which parsers read an answer."""

from __future__ import annotations

from typing import Any

import pytest

HI = [{"role": "user", "content": "hello"}]
TEMPLATE = (
    "{{ reasoning_effort }}{{ messages[0].content }}{{ '<think>\\n' if messages[0].content == 'open' }}"
    "{{ '<think>\\n\\n</think>\\n\\n' if enable_thinking is false }}"
)
THOUGHT = "<think>\nthe fox\n</think>\n\nhello world"


@pytest.fixture
async def fleet(new_fleet: Any, tokenizer_files: dict[str, bytes]) -> Any:
    return await reasoning_fleet(new_fleet, tokenizer_files, "qwen3")


async def reasoning_fleet(new_fleet: Any, tokenizer_files: dict[str, bytes], parser: str | None) -> Any:
    """A fleet with adapters whose templates say what they take, and end with "<think>" or "</think>"."""
    fleet = await new_fleet(reasoning_parser=parser)
    fleet.controller.files["tok-own"] = tokenizer_files | {"chat_template.jinja": TEMPLATE.encode()}
    fleet.controller.table.adapters.add(
        name="own", digest="d-own", version=1, parent="tiny", text_digest="tok-own", vocab_size=400
    )
    fleet.controller.table.base.max_model_len = 1024
    fleet.controller.publish()
    await fleet.until(lambda: "own" in fleet.state.table.models)
    return fleet


async def message_of(fleet: Any, **options: Any) -> dict[str, Any]:
    """A message that is the same whole and streamed."""
    body = {"model": "tiny", "messages": HI} | options
    status, answer = await fleet.post("/v1/chat/completions", body)
    assert status == 200, answer
    message: dict[str, Any] = answer["choices"][0]["message"]
    texts = {"content": "", "reasoning": "", "reasoning_content": ""}
    stream = await fleet.openai.chat.completions.create(model="", messages=[], extra_body=body, stream=True)
    async for chunk in stream:
        delta = chunk.choices[0].delta.model_dump()
        texts = {name: text + (delta.get(name) or "") for name, text in texts.items()}
    assert {name: text or None for name, text in texts.items()} == {name: message[name] or None for name in texts}
    return message


async def test_reasoning_has_both_of_its_names(fleet: Any, says: Any) -> None:
    says(THOUGHT)
    message = await message_of(fleet)
    assert (message["content"], message["reasoning"]) == ("hello world", "the fox")


async def test_reasoning_that_is_cut_off_leaves_no_content(fleet: Any, says: Any) -> None:
    says(THOUGHT)
    message = await message_of(fleet, max_tokens=10)
    assert message["content"] is None
    assert message["reasoning"]


async def test_include_reasoning_false_leaves_it_out(fleet: Any, says: Any) -> None:
    says(THOUGHT)
    message = await message_of(fleet, include_reasoning=False)
    assert (message["content"], message["reasoning"]) == ("hello world", None)


@pytest.mark.parametrize(
    ("options", "reasoning", "content"),
    [
        ({"messages": [{"role": "user", "content": "open"}]}, "hm", "hello"),
        ({"reasoning_effort": "none"}, None, "hm</think>hello"),
        ({}, None, "hm</think>hello"),
    ],
)
async def test_the_prompt_may_have_begun_the_reasoning_or_ended_it(
    fleet: Any, says: Any, options: dict[str, Any], reasoning: str | None, content: str
) -> None:
    says("hm</think>hello")
    message = await message_of(fleet, model="own", **options)
    assert (message["reasoning"], message["content"]) == (reasoning, content)


async def test_reasoning_effort_reaches_the_template(fleet: Any, says: Any, tokenizer: Any) -> None:
    says("hello")
    await message_of(fleet, model="own", reasoning_effort="high")
    assert tokenizer.decode(list(fleet.worker.generates[-1].prompt_token_ids)) == "highhello"


async def test_without_a_parser_reasoning_is_content(
    new_fleet: Any, tokenizer: Any, tokenizer_files: dict[str, bytes]
) -> None:
    fleet = await reasoning_fleet(new_fleet, tokenizer_files, None)
    fleet.worker.answer = [*tokenizer.encode(THOUGHT), fleet.worker.eos]
    message = await message_of(fleet)
    assert (message["content"], message["reasoning"]) == (THOUGHT, None)


async def test_reasoning_comes_before_calls(fleet: Any, says: Any) -> None:
    says('<think>\nhm\n<tool_call>{"name": "now", "arguments": {}}</tool_call>')
    message = await message_of(fleet, tools=[{"type": "function", "function": {"name": "now"}}])
    assert (message["reasoning"], message["content"]) == ("hm", None)
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "now", "arguments": "{}"}]


async def test_ids_of_calls_are_short_where_the_template_insists(fleet: Any, says: Any, tokenizer_files: Any) -> None:
    fleet.controller.files["tok-mistral"] = tokenizer_files | {
        "chat_template.jinja": b"{{ tools and '[TOOL_CALLS]' }}{# strings with length 9! #}{{ messages[0].content }}"
    }
    fleet.controller.table.adapters.add(
        name="mistral", digest="d-m", version=1, parent="tiny", text_digest="tok-mistral", vocab_size=400
    )
    fleet.controller.publish()
    await fleet.until(lambda: "mistral" in fleet.state.table.models)
    says("[TOOL_CALLS]now{}")
    message = await message_of(fleet, model="mistral", tools=[{"type": "function", "function": {"name": "now"}}])
    (call,) = message["tool_calls"]
    assert len(call["id"]) == 9 and call["id"].isalnum()


async def test_structured_content_follows_reasoning(fleet: Any, says: Any) -> None:
    says('hm</think>{"a": 1}')
    body = {"response_format": {"type": "json_object"}, "messages": [{"role": "user", "content": "open"}]}
    message = await message_of(fleet, model="own", **body)
    assert (message["reasoning"], message["content"]) == ("hm", '{"a": 1}')
    assert '"</think>"' in fleet.worker.generates[-1].sampling.grammar
