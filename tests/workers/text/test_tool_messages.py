"""Tools and calls as templates take them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorafleet.workers.answers.tool_formats import HERMES, TOOL_FORMATS
from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.text.tool_messages import ToolForm

TOOL = {"type": "function", "function": {"name": "get_weather", "description": "é", "parameters": {"type": "object"}}}
ASKED = {"role": "user", "content": "Weather?"}


def call(
    call_id: str | None = "call_1", name: str = "get_weather", arguments: Any = '{"city": "Paris"}'
) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(call_id: str, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


WITHOUT = ToolForm()
PLAIN = ToolForm(takes_tools=True, takes_calls=True)


def read(form: ToolForm, messages: Any, tools: Any = None, syntax: Any = HERMES.syntax) -> tuple[list[Any], Any]:
    before = json.dumps([messages, tools])
    found, left = form.messages(messages, tools, syntax)
    assert json.dumps([messages, tools]) == before, "the caller's messages stay"
    return list(found), left


def test_a_template_that_takes_tools_gets_them_as_they_are() -> None:
    messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": [call()]}]
    assert read(PLAIN, messages, [TOOL]) == (messages, [TOOL])


def test_results_have_the_names_of_their_functions_which_some_templates_insist_on() -> None:
    calls = {"role": "assistant", "tool_calls": [call("1"), call("2", name="now")]}
    own = result("1", "sunny") | {"name": "weather"}
    found, _ = read(PLAIN, [ASKED, calls, result("2", "noon"), own, result("3", "lost"), result([], "odd")])  # type: ignore[arg-type]
    assert [message.get("name") for message in found] == [None, None, "now", "weather", None, None]


def test_tools_are_described_in_the_system_message_to_a_template_that_knows_none() -> None:
    messages, tools = read(WITHOUT, [ASKED], [TOOL])
    assert tools is None
    assert messages[1:] == [ASKED]
    assert messages[0]["role"] == "system"
    assert json.dumps(TOOL["function"], ensure_ascii=False) in messages[0]["content"]
    assert '<tool_call>\n{"name": "function_name", "arguments":' in messages[0]["content"]


@pytest.mark.parametrize("content", ["Be kind.", [{"type": "text", "text": "Be kind."}], None])
def test_the_callers_system_message_stays_before_the_description(content: Any) -> None:
    messages, _ = read(WITHOUT, [{"role": "system", "content": content}, ASKED], [TOOL])
    assert len(messages) == 2
    text = messages[0]["content"]
    text = text if isinstance(text, str) else "".join(part["text"] for part in text)
    assert text.startswith("Be kind.") == (content is not None)
    assert "get_weather" in text


def test_a_template_that_refuses_system_messages_has_the_description_in_the_users() -> None:
    messages, _ = read(ToolForm(takes_system=False), [ASKED, {"role": "assistant", "content": "?"}], [TOOL])
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert "get_weather" in messages[0]["content"] and messages[0]["content"].endswith("\n\nWeather?")


def test_the_description_shows_the_models_own_form() -> None:
    messages, _ = read(WITHOUT, [ASKED], [TOOL], TOOL_FORMATS["pythonic"].syntax)
    assert "[function_name(argument_name='value')]" in messages[0]["content"]


def test_calls_and_results_become_text_for_a_template_that_knows_none() -> None:
    messages = [
        ASKED,
        {"role": "assistant", "content": "I look.", "tool_calls": [call(), call("2", arguments={"city": "Rome"})]},
        result("call_1", "sunny"),
        result("2", [{"type": "text", "text": "rain"}]),
        {"role": "user", "content": "And?"},
        {"role": "assistant", "tool_calls": [call("3", arguments="")]},
        result("3", "fog"),
    ]
    found, _ = read(WITHOUT, messages)
    assert [message["role"] for message in found] == ["user", "assistant", "user", "assistant", "user"]
    assert found[1]["content"] == (
        'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    )
    assert found[2]["content"] == (
        "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nrain\n</tool_response>\nAnd?"
    )
    assert found[3]["content"].count("tool_call") == 2
    assert found[4]["content"] == "<tool_response>\nfog\n</tool_response>"


def test_other_messages_are_not_touched_by_a_template_without_tools() -> None:
    messages = [ASKED, {"role": "assistant", "content": "Hello"}]
    assert read(WITHOUT, messages) == (messages, None)


def test_an_empty_list_of_calls_is_none() -> None:
    messages, _ = read(PLAIN, [ASKED, {"role": "assistant", "content": "a", "tool_calls": []}])
    assert messages[1] == {"role": "assistant", "content": "a"}


def test_ids_become_short_where_a_template_insists() -> None:
    form = ToolForm.of(
        "message.tool_calls raise_exception('ids should be alphanumeric strings with length 9!')", takes_tools=True
    )
    messages = [
        ASKED,
        {"role": "assistant", "tool_calls": [call("call_abc"), call("abcDEF123"), call(None)]},
        result("call_abc", "sunny"),
        result("abcDEF123", "rain"),
    ]
    found, _ = read(form, messages)
    ids = [entry["id"] for entry in found[1]["tool_calls"]]
    assert all(len(one) == 9 and one.isalnum() for one in ids)
    assert ids[1] == "abcDEF123"
    assert [message["tool_call_id"] for message in found[2:]] == ids[:2]


def test_several_calls_become_messages_of_one_each_where_a_template_insists() -> None:
    form = ToolForm.of(
        "message.tool_calls raise_exception('This model only supports single tool-calls at once!')", takes_tools=True
    )
    first, second, third = call("1"), call("2"), call("3")
    messages = [
        ASKED,
        {"role": "assistant", "content": "I look.", "tool_calls": [first, second, third]},
        result("2", "rain"),
        result("1", "sunny"),
        {"role": "assistant", "tool_calls": [call("4")]},
        result("4", "fog"),
    ]
    found, _ = read(form, messages)
    assert [entry.get("tool_calls", entry.get("content")) for entry in found[1:]] == [
        [first],
        "sunny",
        [second],
        "rain",
        [third],
        [call("4")],
        "fog",
    ]
    assert [entry["content"] for entry in found[1:6:2]] == ["I look.", "", ""]


def test_a_template_that_reads_tools_in_the_system_message_gets_them_there() -> None:
    form = ToolForm.of(
        "{% if 'tools' in message %}<|tool|>{{ message['tools'] }}<|/tool|>{% endif %}", takes_tools=False
    )
    messages, tools = read(form, [ASKED], [TOOL])
    assert tools is None
    assert messages == [
        {"role": "system", "content": "", "tools": json.dumps([TOOL["function"]], ensure_ascii=False)},
        ASKED,
    ]
    system = {"role": "system", "content": "Be kind."}
    messages, _ = read(form, [system, ASKED], [TOOL])
    assert messages == [system | {"tools": json.dumps([TOOL["function"]], ensure_ascii=False)}, ASKED]


def test_calls_become_text_for_a_template_that_takes_only_tools() -> None:
    messages, tools = read(ToolForm(takes_tools=True), [ASKED, {"role": "assistant", "tool_calls": [call()]}], [TOOL])
    assert tools == [TOOL]
    assert messages[1]["content"].startswith("<tool_call>")


def test_calls_become_text_for_a_template_that_adds_their_arguments_as_text() -> None:
    adds = ToolForm.of("{{ call['function']['arguments'] + '\\n' }}{{ message.tool_calls }}", takes_tools=False)
    prints = ToolForm.of("{{ call['function']['arguments'] | tojson + '}' }}{{ message.tool_calls }}", takes_tools=True)
    assert (adds.takes_calls, prints.takes_calls) == (False, True)


@pytest.mark.parametrize("messages", [[], ["text"], [ASKED, None], "text", 5, None])
def test_what_is_no_conversation_is_left_to_the_template(messages: Any) -> None:
    assert WITHOUT.messages(messages, [TOOL], HERMES.syntax) == (messages, [TOOL])


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ("x", "messages[1].tool_calls must be a list, not str"),
        ({}, "messages[1].tool_calls must be a list, not dict"),
        ([1], 'messages[1].tool_calls[0] must be an object of the type "function"'),
        ([{"type": "custom", "custom": {}}], 'must be an object of the type "function"'),
        ([{"function": {}}], "messages[1].tool_calls[0].function.name is None"),
        ([call(name="")], "function.name is ''"),
        ([call(arguments=[1])], "messages[1].tool_calls[0].function.arguments must be JSON text, not list"),
    ],
)
@pytest.mark.parametrize("form", [PLAIN, WITHOUT])
def test_what_is_no_call_is_refused(form: ToolForm, calls: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        form.messages([ASKED, {"role": "assistant", "tool_calls": calls}], None, HERMES.syntax)
    assert message in caught.value.message
    assert caught.value.param == "messages"
