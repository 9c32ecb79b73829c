"""What a format writes, its own parser reads; templates say which format they ask for."""

from __future__ import annotations

import json

import pytest
from answer_splits import parts_of, short

from lorafleet.workers.answers.call_syntax import WrittenCall
from lorafleet.workers.answers.tool_formats import PLAIN, TOOL_FORMATS, ToolFormat, recognised

CALLS = [WrittenCall("get_weather", {"city": "Zürich", "days": [1, 2], "deep": {"a": None}}), WrittenCall("now", {})]
FORMATS = TOOL_FORMATS | {"plain": PLAIN}


@pytest.mark.parametrize("name", FORMATS)
def test_a_parser_reads_what_its_format_writes(name: str) -> None:
    form: ToolFormat = FORMATS[name]
    for calls in (CALLS, CALLS[:1]):
        read = short(parts_of(lambda: form.parser({"get_weather", "now"}), [form.syntax.text(calls)]))
        assert [part[:2] for part in read] == [("call", call.name) for call in calls]
        assert [json.loads(part[2]) for part in read] == [call.arguments for call in calls]


@pytest.mark.parametrize(
    ("sign", "name"),
    [
        ('{{ "[TOOL_CALLS][" }}', "mistral"),
        ("For each function call return {} within <tool_call></tool_call> XML tags", "hermes"),
        ("{%- if builtin_tools %}<|python_tag|>{% endif %}", "llama3_json"),
        ('Respond in the format {"name": function name, "parameters": dictionary of argument name', "llama3_json"),
        ("[func_name1(params_name1=params_value1)]", "pythonic"),
        ("Use exact format: [func_name1(param1=value1, param2=value2)]", "pythonic"),
        ("formatted as functools[...]", "phi4_mini_json"),
        ("{{ '<function_call> ' + {'name': tc.function.name} }}", "granite-20b-fc"),
        ("{{ '<|start_of_role|>available_tools<|end_of_role|>' }}", "granite"),
        ("<|tool|>{{ message['tools'] }}<|/tool|>", "phi4_mini_json"),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", None),
        ("", None),
    ],
)
def test_a_template_is_recognised_by_its_words(sign: str, name: str | None) -> None:
    assert recognised(sign) == name
