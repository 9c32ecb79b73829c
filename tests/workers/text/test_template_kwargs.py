from __future__ import annotations

from typing import Any

import pytest

from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.text import ChatTemplate
from lorafleet.workers.text.template_kwargs import check_template_kwargs
from lorafleet.workers.text.template_sandbox import Environment

CHAT = [{"role": "user", "content": "hi"}]


def test_plain_values_reach_the_template() -> None:
    template = ChatTemplate("{{ enable_thinking }} {{ budget }} {{ date_string }} {{ null is defined }} {{ t }}")
    variables = {"enable_thinking": False, "budget": 10, "date_string": "26 Jul", "null": None, "t": 0.5, "odd": ""}
    assert template.render(CHAT, chat_template_kwargs=variables) == "False 10 26 Jul False 0.5"


def test_a_variable_of_a_thinking_model_changes_its_prompt() -> None:
    template = ChatTemplate("{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}")
    assert template.render(CHAT) == ""
    assert template.render(CHAT, chat_template_kwargs={"enable_thinking": False}) == "<think></think>"
    assert template.render(CHAT, chat_template_kwargs={"enable_thinking": True}) == ""


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({f"v{number}": 1 for number in range(33)}, "has 33 variables; the limit is 32"),
        ({"a": "x" * 1025}, r"chat_template_kwargs\.a has 1025 characters; the limit is 1024"),
        ({"a": []}, r"chat_template_kwargs\.a is \[\]; it must be a string, a number"),
        ({"a": {"b": 1}}, "it must be a string, a number"),
        ({"a": 2**60}, "numbers go from"),
        ({"a": float("nan")}, "numbers go from"),
        ({"a": -float("inf")}, "numbers go from"),
        ({"": 1}, "has the name ''"),
        ({"a b": 1}, "has the name 'a b'"),
        ({"a\n": 1}, "has the name"),
        ({"_lorafleet_step": 1}, "has the name '_lorafleet_step'"),
        ({"x" * 65: 1}, "has the name 'xxx"),
        ({"é": 1}, "has the name 'é'"),
    ],
)
def test_other_names_and_values_are_refused(variables: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        ChatTemplate("").render(CHAT, chat_template_kwargs=variables)
    assert caught.value.param == "chat_template_kwargs"
    assert len(caught.value.message) < 500


OWN = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "bos_token",
]


@pytest.mark.parametrize("name", [*OWN, *Environment().globals])
def test_what_the_server_sets_cannot_be_set(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"sets '{name}', which the server sets itself"):
        check_template_kwargs({name: "x"})
