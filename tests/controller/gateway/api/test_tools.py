"""Tools over HTTP, with the openai package: a model whose template knows none, and adapters with templates that do."""

from __future__ import annotations

import json
from typing import Any

import pytest

HI = [{"role": "user", "content": "hello"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "strict": True,
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
SHOWN_NOW = {
    "type": "function",
    "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris \\"é\\""}}\n</tool_call>'
TWO = f'{CALL}\n<tool_call>{{"name": "now", "arguments": {{}}}}</tool_call>'
TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}{{ (tool | tojson) + '\n' }}{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}={{ call.function.arguments.city }}{% endfor %}"
    "{{ '\n' }}{% endfor %}"
)


@pytest.fixture
async def fleet(new_fleet: Any, tokenizer_files: dict[str, bytes]) -> Any:
    return await with_room(await new_fleet(), tokenizer_files)


async def with_room(fleet: Any, tokenizer_files: dict[str, bytes], **profile: str) -> Any:
    """Give a fleet a longer context, and the adapter "own" with a template that takes tools, and a profile."""
    fleet.controller.files["tok-own"] = tokenizer_files | {
        "chat_template.jinja": TOOL_TEMPLATE.encode(),
        "lorafleet.json": json.dumps(profile).encode(),
    }
    table = fleet.controller.table
    table.base.max_model_len = 4096
    table.adapters.add(
        name="own", digest="d-own", version=1, parent="tiny", text_digest="tok-own", vocab_size=table.base.vocab_size
    )
    fleet.controller.publish()
    await fleet.until(lambda: "own" in fleet.state.table.models)
    return fleet


def prompt_of(fleet: Any, tokenizer: Any) -> str:
    return str(tokenizer.decode(list(fleet.worker.generates[-1].prompt_token_ids), skip_special_tokens=False))


async def streamed(fleet: Any, **options: Any) -> dict[str, Any]:
    """A streamed answer, put together as clients do it."""
    found: dict[str, Any] = {"content": "", "calls": [], "finish": [], "reasoning": "", "chunks": 0}
    async for chunk in await fleet.openai.chat.completions.create(
        **{"model": "tiny", "messages": HI} | options, stream=True
    ):
        choice = chunk.choices[0]
        found["chunks"] += 1
        found["content"] += choice.delta.content or ""
        found["reasoning"] += getattr(choice.delta, "reasoning", None) or ""
        assert getattr(choice.delta, "reasoning", None) == getattr(choice.delta, "reasoning_content", None)
        for call in choice.delta.tool_calls or []:
            if call.index == len(found["calls"]):
                assert call.id and call.type == "function" and call.function.name
                found["calls"].append([call.function.name, ""])
            else:
                assert call.index == len(found["calls"]) - 1 and call.id is None and call.function.name is None
            found["calls"][call.index][1] += call.function.arguments
        found["finish"] += [choice.finish_reason] if choice.finish_reason else []
    return found


async def test_a_call_is_a_message_of_calls(fleet: Any, says: Any) -> None:
    says(f"I look.\n\n{TWO}")
    answer = await fleet.openai.chat.completions.create(model="tiny", messages=HI, tools=[WEATHER, NOW])
    message = answer.choices[0].message
    assert (message.content, answer.choices[0].finish_reason) == ("I look.", "tool_calls")
    assert [call.function.name for call in message.tool_calls] == ["get_weather", "now"]
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": 'Paris "é"'}
    assert {call.type for call in message.tool_calls} == {"function"}
    assert len({call.id for call in message.tool_calls}) == 2


async def test_content_is_null_beside_calls(fleet: Any, says: Any) -> None:
    says(CALL)
    _, answer = await fleet.post("/v1/chat/completions", {"model": "tiny", "messages": HI, "tools": [WEATHER]})
    message = answer["choices"][0]["message"]
    assert message["content"] is None
    assert set(message) >= {"role", "content", "refusal", "reasoning", "reasoning_content", "tool_calls"}


async def test_a_stream_tells_each_call_and_then_its_arguments(fleet: Any, says: Any) -> None:
    says(f"I look.\n\n{TWO}")
    found = await streamed(fleet, tools=[WEATHER, NOW])
    assert found["content"] == "I look."
    assert found["calls"] == [["get_weather", '{"city": "Paris \\"é\\""}'], ["now", "{}"]]
    assert found["finish"] == ["tool_calls"]


async def test_a_stream_of_several_choices_keeps_them_apart(fleet: Any, says: Any) -> None:
    says(CALL)
    names: list[list[str]] = [[], []]
    stream = await fleet.openai.chat.completions.create(model="tiny", messages=HI, tools=[WEATHER], n=2, stream=True)
    async for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or []:
            names[chunk.choices[0].index] += [call.function.name] if call.function.name else []
    assert names == [["get_weather"], ["get_weather"]]


async def test_without_a_call_the_answer_is_an_ordinary_one(fleet: Any, says: Any) -> None:
    says("hello < world")
    answer = await fleet.openai.chat.completions.create(model="tiny", messages=HI, tools=[WEATHER])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("hello < world", "stop")
    assert answer.choices[0].message.tool_calls is None
    found = await streamed(fleet, tools=[WEATHER])
    assert (found["content"], found["finish"]) == ("hello < world", ["stop"])


@pytest.mark.parametrize(
    "text", ["<tool_call>oops</tool_call>", '<tool_call>{"name": "get_w', "</tool_call>", "<tool_call>"]
)
async def test_what_is_no_call_is_content(fleet: Any, says: Any, text: str) -> None:
    says(text)
    answer = await fleet.openai.chat.completions.create(model="tiny", messages=HI, tools=[WEATHER])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, "stop")
    assert (await streamed(fleet, tools=[WEATHER]))["content"] == text


async def test_a_call_that_breaks_off_says_length(fleet: Any, says: Any) -> None:
    says(CALL)
    options = {"tools": [WEATHER], "max_tokens": len(CALL) - 25}
    answer = await fleet.openai.chat.completions.create(model="tiny", messages=HI, **options)
    assert answer.choices[0].finish_reason == "length"
    arguments = answer.choices[0].message.tool_calls[0].function.arguments
    assert arguments.startswith('{"city"') and not arguments.endswith("}")
    found = await streamed(fleet, **options)
    assert (found["calls"], found["finish"]) == ([["get_weather", arguments]], ["length"])


async def test_parallel_tool_calls_false_leaves_one(fleet: Any, says: Any) -> None:
    says(TWO)
    options = {"tools": [WEATHER, NOW], "parallel_tool_calls": False}
    answer = await fleet.openai.chat.completions.create(model="tiny", messages=HI, **options)
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["get_weather"]
    assert [name for name, _ in (await streamed(fleet, **options))["calls"]] == ["get_weather"]


async def test_tool_choice_none_makes_no_calls_and_shows_no_tools(fleet: Any, says: Any, tokenizer: Any) -> None:
    says(CALL)
    answer = await fleet.openai.chat.completions.create(model="tiny", messages=HI, tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.content == CALL
    assert "get_weather" not in prompt_of(fleet, tokenizer)


async def test_log_probabilities_of_a_stream_are_those_of_all_tokens(fleet: Any, says: Any) -> None:
    says(CALL)
    options = {"model": "tiny", "messages": HI, "tools": [WEATHER], "logprobs": True}
    whole = await fleet.openai.chat.completions.create(**options)
    stream = await fleet.openai.chat.completions.create(**options, stream=True)
    content = [entry async for chunk in stream if (own := chunk.choices[0].logprobs) for entry in own.content]
    assert content == whole.choices[0].logprobs.content
    assert len(content) == len(fleet.worker.answer)


async def test_a_template_without_tools_gets_them_in_a_system_message(fleet: Any, says: Any, tokenizer: Any) -> None:
    says("hello")
    await fleet.openai.chat.completions.create(model="tiny", messages=HI, tools=[WEATHER])
    prompt = prompt_of(fleet, tokenizer)
    assert prompt.startswith("<|im_start|>system\n")
    assert '{"name": "get_weather", "description": "The weather", "parameters": ' in prompt
    assert '<tool_call>\n{"name": "function_name"' in prompt


async def test_a_template_with_tools_gets_them_without_what_is_for_the_server(
    fleet: Any, says: Any, tokenizer: Any
) -> None:
    says("hello")
    history = [
        *HI,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    await fleet.openai.chat.completions.create(model="own", messages=history, tools=[NOW, WEATHER])
    described = {"type": "function", "function": {k: v for k, v in WEATHER["function"].items() if k != "strict"}}
    assert prompt_of(fleet, tokenizer) == (
        f"{json.dumps(SHOWN_NOW)}\n{json.dumps(described)}\nuser:hello\nassistant:get_weather=Rome\ntool:sunny\n"
    )


async def test_allowed_tools_are_those_that_are_shown(fleet: Any, says: Any, tokenizer: Any) -> None:
    says("hello")
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    await fleet.openai.chat.completions.create(model="own", messages=HI, tools=[NOW, WEATHER], tool_choice=choice)
    assert prompt_of(fleet, tokenizer) == f"{json.dumps(SHOWN_NOW)}\nuser:hello\n"


async def test_an_adapters_profile_chooses_its_parser(
    new_fleet: Any, tokenizer: Any, tokenizer_files: dict[str, bytes]
) -> None:
    fleet = await with_room(
        await new_fleet(), tokenizer_files, tool_call_parser="llama3_json", reasoning_parser="qwen3"
    )
    text = '<think>hm</think>{"name": "now", "parameters": {}}'
    fleet.worker.answer = [*tokenizer.encode(text), fleet.worker.eos]
    answer = await fleet.openai.chat.completions.create(model="own", messages=HI, tools=[NOW])
    message = answer.choices[0].message
    assert ([call.function.name for call in message.tool_calls], message.reasoning) == (["now"], "hm")
    base = await fleet.openai.chat.completions.create(model="tiny", messages=HI, tools=[NOW])
    assert base.choices[0].message.content == text


async def test_the_servers_parser_is_the_flags(
    new_fleet: Any, tokenizer: Any, tokenizer_files: dict[str, bytes]
) -> None:
    fleet = await with_room(await new_fleet(tool_call_parser="pythonic"), tokenizer_files)
    fleet.worker.answer = [*tokenizer.encode("[get_weather(city='Rome'), now()]"), fleet.worker.eos]
    found = await streamed(fleet, tools=[NOW, WEATHER])
    assert found["calls"] == [["get_weather", '{"city": "Rome"}'], ["now", "{}"]]


async def test_marks_that_are_special_tokens_are_seen_and_other_special_tokens_are_not(
    fleet: Any, tokenizer: Any, tokenizer_files: dict[str, bytes]
) -> None:
    data = json.loads(tokenizer_files["tokenizer.json"])
    for token in data["added_tokens"]:
        if token["content"] == "<|im_start|>":
            token["content"] = "<|tool_call|>"
    data["model"]["vocab"]["<|tool_call|>"] = data["model"]["vocab"].pop("<|im_start|>")
    fleet.controller.files["tok-granite"] = {
        "tokenizer.json": json.dumps(data).encode(),
        "tokenizer_config.json": b'{"eos_token": "<|im_end|>"}',
        "chat_template.jinja": b"{{ tools | tojson }}<|tool_call|>{{ messages[0].content }}",
    }
    fleet.controller.table.adapters.add(
        name="granite", digest="d-2", version=1, parent="tiny", text_digest="tok-granite", vocab_size=400
    )
    fleet.controller.publish()
    await fleet.until(lambda: "granite" in fleet.state.table.models)
    mark, hidden = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|endoftext|>")
    call = tokenizer.encode('[{"name": "now", "arguments": {}}]')
    fleet.worker.answer = [hidden, mark, *call, fleet.worker.eos]
    answer = await fleet.openai.chat.completions.create(model="granite", messages=HI, tools=[NOW])
    message = answer.choices[0].message
    assert (message.content, [call.function.name for call in message.tool_calls]) == (None, ["now"])
    plain = await fleet.openai.chat.completions.create(model="granite", messages=HI)
    assert plain.choices[0].message.content == '[{"name": "now", "arguments": {}}]'


async def test_tokenize_counts_tools_too(fleet: Any) -> None:
    body = {"model": "own", "messages": HI}
    _, without = await fleet.post("/tokenize", body)
    _, answer = await fleet.post("/tokenize", body | {"tools": [WEATHER]})
    assert answer["count"] > without["count"] + 50


async def test_tokenize_writes_calls_as_chats_do(new_fleet: Any, tokenizer_files: Any) -> None:
    fleet = await with_room(await new_fleet(tool_call_parser="pythonic"), tokenizer_files)
    _, answer = await fleet.post("/tokenize", {"model": "tiny", "messages": HI, "tools": [WEATHER]})
    await fleet.openai.chat.completions.create(model="tiny", messages=HI, tools=[WEATHER], max_tokens=1)
    assert answer["tokens"] == list(fleet.worker.generates[-1].prompt_token_ids)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no list": ({"tools": 3}, "tools: expected `array`, got `int`."),
    "no function": ({"tools": [{"type": "function"}]}, "tools[0]: object missing required field `function`."),
    "no name": ({"tools": [{"function": {}}]}, "tools[0].function: object missing required field `name`."),
    "an empty name": ({"tools": [{"function": {"name": ""}}]}, "tools[0].function.name is ''"),
    "a long name": ({"tools": [{"function": {"name": "n" * 300}}]}, "it must have 1 to 256 characters"),
    "a line in the name": ({"tools": [{"function": {"name": "a\nb"}}]}, "tools[0].function.name is 'a\\nb'"),
    "a name twice": ({"tools": [NOW, NOW]}, "tools has two functions called 'now'."),
    "another type": ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type is 'custom'"),
    "too many": (
        {"tools": [{"function": {"name": f"f{n}"}} for n in range(1025)]},
        "tools has 1025 tools; the limit is",
    ),
    "parameters that are no object": (
        {"tools": [{"function": {"name": "f", "parameters": []}}]},
        "tools[0].function.parameters: expected `object`, got `array`.",
    ),
    "another choice": ({"tools": [NOW], "tool_choice": "any"}, "tool_choice is 'any'; it must be one of none, auto"),
    "a choice without tools": ({"tool_choice": "required"}, 'tool_choice is "required", but there are no tools.'),
    "an unknown function": (
        {"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "later"}}},
        "tool_choice names the function 'later', which is not among the tools.",
    ),
    "no function in the choice": ({"tools": [NOW], "tool_choice": {"type": "function"}}, "tool_choice is {'type'"),
    "a choice of another type": (
        {"tools": [NOW], "tool_choice": 3},
        "tool_choice: expected `str | object`, got `int`.",
    ),
    "allowed tools without a mode": (
        {"tools": [NOW], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
        "tool_choice.allowed_tools must have a mode",
    ),
    "an unknown allowed tool": (
        {
            "tools": [NOW],
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [WEATHER]}},
        },
        "tool_choice.allowed_tools.tools[0] names the function 'get_weather'",
    ),
    "OpenAI's old functions": ({"functions": [{"name": "f"}]}, "Send them as tools instead."),
    "OpenAI's old choice": ({"function_call": {"name": "f"}}, "Send tool_choice instead."),
    "a call in the history that is none": (
        {"messages": [*HI, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
        "messages[1].tool_calls[0] must be an object",
    ),
    "an unknown effort": ({"reasoning_effort": "huge"}, "reasoning_effort is 'huge'; it must be one of none, minimal"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_mistake_is_named(fleet: Any, name: str) -> None:
    fields, message = BAD[name]
    status, answer = await fleet.post("/v1/chat/completions", {"model": "tiny", "messages": HI} | fields)
    assert status == 400, answer
    assert message in answer["error"]["message"]
    assert answer["error"]["param"] in fields


async def test_auto_can_be_turned_off(new_fleet: Any, tokenizer_files: dict[str, bytes]) -> None:
    fleet = await with_room(await new_fleet(enable_auto_tool_choice=False), tokenizer_files)
    body = {"model": "tiny", "messages": HI, "tools": [NOW], "max_tokens": 1}
    status, answer = await fleet.post("/v1/chat/completions", body)
    assert status == 400
    assert "--no-enable-auto-tool-choice" in answer["error"]["message"]
    status, _ = await fleet.post("/v1/chat/completions", body | {"tool_choice": "none"})
    assert status == 200


NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")])
async def test_calls_that_must_be_made_are_enforced_by_a_grammar(
    fleet: Any, says: Any, choice: Any, reason: str
) -> None:
    says(CALL)
    options = {"tools": [WEATHER, NOW], "tool_choice": choice}
    answer = await fleet.openai.chat.completions.create(model="tiny", messages=HI, **options)
    grammar = fleet.worker.generates[-1].sampling.grammar
    assert '"<tool_call>"' in grammar and "get_weather" in grammar
    assert ("now" in grammar) == (choice == "required")
    message = answer.choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["get_weather"]
    assert (message.content, answer.choices[0].finish_reason) == ("", reason)
    found = await streamed(fleet, **options)
    assert (found["content"], found["calls"][0][0], found["finish"]) == ("", "get_weather", [reason])


async def test_a_family_without_json_writes_enforced_calls_as_a_plain_list(
    new_fleet: Any, tokenizer: Any, tokenizer_files: dict[str, bytes]
) -> None:
    fleet = await with_room(await new_fleet(tool_call_parser="pythonic"), tokenizer_files)
    text = '[{"name": "now", "parameters": {}}, {"name": "get_weather", "parameters": {"city": "x"}}]'
    fleet.worker.answer = [*tokenizer.encode(text), fleet.worker.eos]
    found = await streamed(fleet, tools=[WEATHER, NOW], tool_choice="required")
    assert found["calls"] == [["now", "{}"], ["get_weather", '{"city": "x"}']]


async def test_calls_that_may_be_made_are_not_constrained(fleet: Any, says: Any) -> None:
    says("hello")
    await fleet.openai.chat.completions.create(model="tiny", messages=HI, tools=[WEATHER])
    assert fleet.worker.generates[-1].sampling.grammar == ""


async def test_structured_content_or_calls_may_be_the_answer(fleet: Any, says: Any) -> None:
    schema = {"type": "object", "properties": {"answer": {"type": "integer"}}}
    format = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    options = {"model": "tiny", "messages": HI, "tools": [NOW], "response_format": format}
    says('{"answer": 1}')
    answer = await fleet.openai.chat.completions.create(**options)
    grammar = fleet.worker.generates[-1].sampling.grammar
    assert '"<tool_call>"' in grammar and '"answer"' in grammar
    assert answer.choices[0].message.content == '{"answer": 1}'
    await fleet.openai.chat.completions.create(**options, tool_choice="required")
    assert '"answer"' not in fleet.worker.generates[-1].sampling.grammar


async def test_a_schema_that_cannot_be_enforced_is_refused_only_if_it_must_be(fleet: Any, says: Any) -> None:
    says(CALL)
    function: dict[str, Any] = {
        "name": "f",
        "parameters": {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
    }
    body = {"model": "tiny", "messages": HI, "tool_choice": "required", "max_tokens": 9}
    status, _ = await fleet.post("/v1/chat/completions", body | {"tools": [{"function": function}]})
    assert status == 200
    strict = {"function": function | {"strict": True}}
    status, answer = await fleet.post("/v1/chat/completions", body | {"tools": [strict]})
    assert (status, answer["error"]["param"]) == (400, "tools")
    status, _ = await fleet.post("/v1/chat/completions", body | {"tools": [strict], "tool_choice": "auto"})
    assert status == 200
