from __future__ import annotations

from typing import Any

import pytest
from chat_families import FAMILIES

from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.text import ChatTemplate
from lorafleet.workers.text.messages import TemplateForm, content_text, renewed, template_messages
from lorafleet.workers.text.traced_text import content_of

STRINGS = TemplateForm(accepts_parts=False, wants_parts=False, has_developer=False)
EITHER = TemplateForm(accepts_parts=True, wants_parts=False, has_developer=False)
PARTS = TemplateForm(accepts_parts=True, wants_parts=True, has_developer=True)


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


# (content sent, for a template of strings, of either, of parts)
CONTENTS: list[tuple[Any, Any, Any, Any]] = [
    ("a", "a", "a", [_text("a")]),
    ("", "", "", [_text("")]),
    ([], "", [], []),
    ([_text("a"), _text("b")], "a\nb", [_text("a"), _text("b")], [_text("a"), _text("b")]),
    (["a", _text("b")], "a\nb", [_text("a"), _text("b")], [_text("a"), _text("b")]),
    ([_text("a") | {"cache_control": {"type": "ephemeral"}}], "a", [_text("a")], [_text("a")]),
    ([{"type": "input_text", "text": "a"}], "a", [_text("a")], [_text("a")]),
    ([{"type": "output_text", "text": "a", "annotations": []}], "a", [_text("a")], [_text("a")]),
    ([{"type": "refusal", "refusal": "no"}], "no", [_text("no")], [_text("no")]),
]


@pytest.mark.parametrize(("sent", "for_strings", "for_either", "for_parts"), CONTENTS)
def test_content_has_the_form_the_template_reads(sent: Any, for_strings: Any, for_either: Any, for_parts: Any) -> None:
    for form, expected in ((STRINGS, for_strings), (EITHER, for_either), (PARTS, for_parts)):
        (message,) = template_messages([{"role": "user", "content": sent}], form)
        assert message == {"role": "user", "content": expected}
    assert content_text(sent) == for_strings


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
READ_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
NULLS = {"refusal": None, "audio": None, "function_call": None, "tool_calls": None, "reasoning_content": None}

# (message sent, message read by a template of strings)
MESSAGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"role": "assistant", "content": None}, {"content": ""}),
    ({"role": "assistant"}, {"content": ""}),
    ({"role": "assistant", "content": None, "tool_calls": [CALL]}, {"content": "", "tool_calls": [READ_CALL]}),
    ({"role": "assistant", "tool_calls": [CALL]}, {"content": "", "tool_calls": [READ_CALL]}),
    ({"role": "assistant", "content": "a", "tool_calls": []}, {"content": "a"}),
    ({"role": "assistant", "content": "a", "annotations": [], **NULLS}, {"content": "a", "annotations": []}),
    ({"role": "assistant", "content": None, **NULLS, "refusal": "no"}, {"content": "no", "refusal": "no"}),
    ({"role": "assistant", "content": "a", "refusal": "no"}, {"content": "a", "refusal": "no"}),
    ({"role": "user", "content": "a", "name": "bob"}, {"content": "a", "name": "bob"}),
    ({"role": "user", "content": "a", "name": None}, {"content": "a"}),
    ({"role": "tool", "content": "1", "tool_call_id": "c1"}, {"content": "1", "tool_call_id": "c1"}),
    ({"role": "user", "content": "a", "more": {"x": [1, None]}}, {"content": "a", "more": {"x": [1, None]}}),
    ({"role": "assistant", "content": "a", "prefix": True}, {"content": "a", "prefix": True}),
]


@pytest.mark.parametrize(("sent", "read"), MESSAGES)
def test_messages_as_clients_send_them_are_read(sent: dict[str, Any], read: dict[str, Any]) -> None:
    assert template_messages([sent], STRINGS) == [{"role": sent["role"], **read}]


def test_function_calls_of_the_first_kind_are_read_as_tool_calls() -> None:
    old: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "4"},
        {"role": "function", "name": "f", "content": None},
        {"role": "assistant", "content": "a", "function_call": None},
        {"role": "assistant", "content": "a", "tool_calls": [CALL], "function_call": {"name": "f", "arguments": "{}"}},
    ]
    call = {"id": "call_f", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    result = {"role": "tool", "name": "f", "tool_call_id": "call_f"}
    assert [renewed(message) for message in old] == [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {**result, "content": "4"},
        {**result, "content": ""},
        *old[3:],
    ]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_an_assistant_without_content_says_nothing_in_any_template(family: Any) -> None:
    template = ChatTemplate(family.template)
    hi, calls = {"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [CALL]}
    expected = template.render([hi, {"role": "assistant", "content": ""}, hi], bos_token="<s>", eos_token="</s>")
    for silent in (calls, calls | {"content": None}, {"role": "assistant"}, {"role": "assistant", "content": []}):
        assert template.render([hi, silent, hi], bos_token="<s>", eos_token="</s>") == expected


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}, "'image_url'"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "'input_audio'"),
        ({"type": "file", "file": {"file_id": "f"}}, "'file'"),
        ({"type": "video_url", "video_url": {"url": "file:///etc/passwd"}}, "'video_url'"),
        ({"type": "text"}, "'text'"),
        ({"type": "text", "text": None}, "'text'"),
        ({"type": ["text"], "text": "a"}, r"\['text'\]"),
        ({"type": "t" * 1000, "text": "a"}, "'ttt"),
        ({}, "None"),
        (None, "'NoneType'"),
    ],
)
def test_other_parts_than_text_are_refused_by_place_and_type(part: Any, kind: str) -> None:
    chat: list[Any] = [{"role": "system", "content": "a"}, {"role": "user", "content": [_text("a"), part]}]
    for form in (STRINGS, EITHER, PARTS):
        with pytest.raises(InvalidRequestError, match=rf"messages\[1\]\.content\[1\] has the type {kind}") as caught:
            template_messages(chat, form)
        assert (caught.value.param, len(caught.value.message) < 400) == ("messages", True)


def test_audio_of_an_earlier_answer_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"messages\[0\]\.audio is given; this server takes text only"):
        template_messages([{"role": "assistant", "content": None, "audio": {"id": "a1"}}], STRINGS)


def test_a_developer_is_the_system_in_a_template_without_that_role() -> None:
    chat = [{"role": "developer", "content": "be brief"}]
    assert template_messages(chat, STRINGS)[0]["role"] == "system"
    assert template_messages(chat, PARTS)[0]["role"] == "developer"
    knows = "{% for m in messages %}{% if m.role in ['developer', 'system'] %}[{{ m.role }}]{% endif %}{% endfor %}"
    assert ChatTemplate(knows).render(chat) == "[developer]"
    assert ChatTemplate("{{ messages[0].role }} is no developer").render(chat) == "system is no developer"


def test_all_text_of_a_message_is_traced_but_a_role_of_the_api() -> None:
    sent = {"role": "user", "content": "a", "name": "b", "odd": {"c": ["d"]}}
    (message,) = template_messages([sent], STRINGS)
    assert content_of(message["role"]) == ()
    assert all(map(content_of, [message["content"], message["name"], *message["odd"], *message["odd"]["c"]]))
    assert content_of(template_messages([{"role": "critic", "content": "a"}], STRINGS)[0]["role"])
