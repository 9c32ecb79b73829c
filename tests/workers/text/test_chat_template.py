"""The reference is transformers' apply_chat_template with the same template."""

from __future__ import annotations

import threading
import tracemalloc
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from chat_families import FAMILIES

from lorafleet.workers.errors import InvalidRequestError, ModelError
from lorafleet.workers.text import ChatTemplate, Tokenizer, template_sandbox

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": 'Be <brief> & "kind" —日本'},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello", "name": None},
    {"role": "user", "content": "bye"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é <x>", "parameters": {"type": "object"}}}]

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

TEMPLATES = {
    "llama-2": LLAMA_2,
    "blocks are trimmed": "\n{% for m in messages %}\n    {% if m.role == 'user' %}\n  U {{ m.content }}\n"
    "    {%- endif %}\n{% endfor %}\n",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}"
    "{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set x = 1 %}{{ m.content }}"
    "{{ loop.index }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ x }}{% endfor %}",
    "tools": "{% if tools %}{{ tools | tojson }}{{ tools[0] | tojson(indent=2) }}{{ tools | tojson(sort_keys=true) }}"
    "{% endif %}{{ messages | tojson(separators=(',', ':')) }}",
    "macros and namespaces": "{% macro show(m, sep='|') %}{{ m.role ~ sep }}"
    "{{ caller() if caller else '' }}{% endmacro %}"
    "{% set ns = namespace(n=0, last=none) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + m.content | length %}"
    "{{ show(m) }}{% call show(m, sep='/') %}inner{% endcall %}{% endfor %}{{ ns.n * 2 }}{{ 'ab' * 3 }}{{ 2 ** 5 }}",
    "recursion": "{% macro down(n) %}{{ n }}{% if n > 0 %}{{ down(n - 1) }}{% endif %}{% endmacro %}{{ down(9) }}",
    "loop attributes": "{% for m in messages %}{{ loop.length }}{{ loop.revindex }}"
    "{{ loop.previtem.role if loop.previtem }}{{ loop.nextitem.role if loop.nextitem }}{{ loop.changed(m.role) }}"
    "{% else %}none{% endfor %}"
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content }}{% endfor %}",
    "undefined names": "{{ nothing }}{% if nothing is defined %}x{% endif %}{{ documents is none }}{{ pad_token }}"
    "{{ add_generation_prompt }}{{ messages[2].name is defined }}{{ bos_token }}",
    "dictionaries": "{% set d = dict(a=1, **{'b': 2}) %}{% for k, v in d.items() %}{{ k }}{{ v }}{% endfor %}"
    "{{ d | tojson }}{{ namespace(self=1).self }}",
}


@pytest.fixture(scope="module")
def reference(byte_level_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(byte_level_dir)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("prompted", [True, False])
def test_the_text_equals_transformers(
    reference: Any, byte_level: Tokenizer, name: str, tools: Any, prompted: bool
) -> None:
    expected = reference.apply_chat_template(
        CHAT, chat_template=TEMPLATES[name], tokenize=False, tools=tools, add_generation_prompt=prompted
    )
    ours = ChatTemplate(TEMPLATES[name]).render(CHAT, prompted, tools, **byte_level.special_tokens)
    assert ours == expected


def test_the_models_own_template_equals_transformers(reference: Any, byte_level: Tokenizer) -> None:
    for add in (True, False):
        expected = reference.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=add)
        assert ChatTemplate.from_tokenizer(byte_level).render(CHAT, add, **byte_level.special_tokens) == expected


def test_reasoning_is_found_under_each_of_its_names(reference: Any) -> None:
    source = "{% for m in messages %}[{{ m.reasoning_content }}{{ m.thinking }}{{ m.reasoning }}]{% endfor %}"
    chat = [{"role": "assistant", "content": "", name: name} for name in ("reasoning", "thinking", "reasoning_content")]
    expected = reference.apply_chat_template(chat, chat_template=source, tokenize=False)
    assert ChatTemplate(source).render(chat) == expected


def test_extra_variables_reach_the_template() -> None:
    template = ChatTemplate("{{ enable_thinking }}{{ documents | length }}")
    assert template.render(CHAT, chat_template_kwargs={"enable_thinking": False}, documents=[{}, {}]) == "False2"


def test_the_callers_messages_are_not_changed() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    chat = [{"role": "assistant", "content": [{"type": "text", "text": "a"}], "tool_calls": [call]}]
    ChatTemplate("{{ messages }}").render(chat)
    assert chat[0]["content"] == [{"type": "text", "text": "a"}]
    assert call["function"] == {"name": "f", "arguments": "{}"}


def test_json_in_a_tool_calls_arguments_becomes_an_object() -> None:
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments | tojson }}")
    for arguments, expected in [('{"a":1}', '{"a": 1}'), ("", "{}"), ("not json", '"not json"'), ("[1]", '"[1]"')]:
        chat = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
        assert template.render(chat) == expected


def test_the_clock_of_strftime_now_is_the_one_given() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2024, 7, 26))
    assert template.render(CHAT) == "26 Jul 2024"


CONTINUED = ["The answer is", "  The answer is  ", "The answer is\n\n", "answer 日本", "x"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("content", CONTINUED)
def test_a_continued_message_ends_where_transformers_ends_it(reference: Any, name: str, content: str) -> None:
    template = FAMILIES[name].template
    named: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]
    for shape in (chat, chat[:1]):
        expected = reference.apply_chat_template(
            shape, chat_template=template, tokenize=False, continue_final_message=True, **named
        )
        assert ChatTemplate(template).render(shape, continue_final_message=True, **named) == expected
        assert ChatTemplate(template).render(shape, False, continue_final_message=True, **named) == expected


def test_the_last_part_of_a_message_is_continued() -> None:
    chat = [{"role": "assistant", "content": [{"type": "text", "text": part} for part in ("one", "two ")]}]
    assert ChatTemplate(FOR_PARTS).render(chat, continue_final_message=True) == "<one><two "
    assert ChatTemplate(FOR_STRINGS + ".").render(chat, continue_final_message=True) == "one\ntwo "


@pytest.mark.parametrize(
    ("source", "last", "reason"),
    [
        ("{{ messages[0].content }}", {"role": "assistant", "content": None}, "no content to continue"),
        ("{{ messages[0].content }}", {"role": "assistant", "tool_calls": [{"id": "1"}]}, "no content to continue"),
        ("{{ messages[0].content }}", {"role": "assistant", "content": []}, "no content to continue"),
        ("nothing", {"role": "assistant", "content": "x"}, "leaves out or changes the last message's content, 'x'"),
        ("{{ messages[0].content | upper }}", {"role": "assistant", "content": "x"}, "leaves out or changes"),
        ("{{ messages[0].content[5:] }}", {"role": "assistant", "content": "from here"}, "leaves out or changes"),
    ],
)
def test_what_cannot_be_continued_is_refused(source: str, last: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        ChatTemplate(source).render([last], continue_final_message=True)


def test_a_message_is_continued_or_begun() -> None:
    with pytest.raises(InvalidRequestError, match="both true") as caught:
        ChatTemplate(FOR_STRINGS).render(CHAT, True, continue_final_message=True)
    assert caught.value.param == "continue_final_message"


PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
FOR_STRINGS = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
FOR_PARTS = "{% for m in messages %}{% for part in m['content'] %}<{{ part.text }}>{% endfor %}{% endfor %}"
FOR_BOTH = (
    "{% for m in messages %}{% set body = m.content %}{% if body is string %}{{ body }}{% else %}"
    "{% for part in body | list %}<{{ part['text'] }}>{% endfor %}{% endif %}{% endfor %}"
)


def test_parts_are_flattened_for_a_template_that_wants_strings() -> None:
    template = ChatTemplate(FOR_STRINGS)
    assert not template.accepts_parts
    assert template.render(PARTS) == "one\ntwo"


@pytest.mark.parametrize("source", [FOR_PARTS, FOR_BOTH])
def test_parts_reach_a_template_that_goes_over_them(reference: Any, source: str) -> None:
    template = ChatTemplate(source)
    assert template.accepts_parts
    assert template.render(PARTS) == "<one><two>"
    assert template.render(PARTS) == reference.apply_chat_template(PARTS, chat_template=source, tokenize=False)


def test_a_string_becomes_a_part_only_for_a_template_that_knows_nothing_else() -> None:
    chat = [{"role": "user", "content": "one"}]
    assert ChatTemplate(FOR_PARTS).render(chat) == "<one>"
    assert ChatTemplate(FOR_BOTH).render(chat) == "one"


@pytest.mark.parametrize("source", [FOR_STRINGS, FOR_PARTS])
@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "'image_url'"),
        ({"type": "text", "text": 3}, "'text'"),
        ({"text": "x"}, "None"),
        (3, "'int'"),
    ],
)
def test_a_part_that_is_not_text_is_refused_by_its_type(source: str, part: Any, kind: str) -> None:
    with pytest.raises(InvalidRequestError, match=rf"messages\[0\]\.content\[0\] has the type {kind}") as caught:
        ChatTemplate(source).render([{"role": "user", "content": [part]}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ([], "at least one message"),
        (5, "messages is 5; it must be a list"),
        ("hi", "messages is 'hi'"),
        (["hi"], r"messages\[0\] must be an object, not str"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content must be a string or a list of parts, not int"),
        ([{"role": "user", "content": "x", "when": object()}], "must be plain JSON, not object"),
    ],
)
def test_messages_of_the_wrong_shape_are_refused(chat: Any, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        ChatTemplate(FOR_STRINGS).render(chat)


def _nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"metadata": _nested(600)}, "nested too deep; the limit is 64"),
        ({"metadata": _nested(5000)}, "nested too deep; the limit is 64"),
        ({"tool_calls": [{"function": {"arguments": "[" * 50_000 + "]" * 50_000}}]}, "nested 50000 deep"),
        ({"tool_calls": [{"function": {"arguments": '{"a":' * 600 + "1" + "}" * 600}}]}, "nested 600 deep"),
        ({"tool_calls": [{"function": {"arguments": "[" + "{}," * 100_000 + "1]"}}]}, "the limit is 65536"),
    ],
)
def test_what_is_nested_too_deeply_or_holds_too_much_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        ChatTemplate(FOR_STRINGS).render([{"role": "assistant", "content": "x", **fields}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "arguments", ["not JSON", "9" * 5000, '{"a": ' + "9" * 5000 + "}", "\ud800", '{"a": "\ud800"}']
)
def test_arguments_that_are_no_json_object_stay_text(arguments: str) -> None:
    source = "{{ messages[0].tool_calls[0].function.arguments | string | length }}"
    chat = [{"role": "assistant", "content": "x", "tool_calls": [{"function": {"arguments": arguments}}]}]
    assert int(ChatTemplate(source).render(chat)) > 0


def test_an_error_quotes_little_of_the_messages() -> None:
    for source, content in (
        ("{{ raise_exception(messages[0].content) }}", "x" * 1_000_000),
        (FOR_STRINGS, [{"type": "y" * 1_000_000}]),
        (FOR_STRINGS, [{"type": {"z" * 1_000_000: 1}}]),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            ChatTemplate(source).render([{"role": "user", "content": content}])
        assert len(caught.value.message) < 500


def test_what_a_template_raises_is_the_callers_to_read() -> None:
    chat = [{"role": "assistant", "content": "first"}]
    with pytest.raises(InvalidRequestError, match="Conversation roles must alternate") as caught:
        ChatTemplate(LLAMA_2).render(chat, bos_token="", eos_token="")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[9].content }}",
        "{{ messages[0].a.b }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ strftime_now(3) }}",
        "{% include 'x' %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_any_failure_inside_a_template_is_an_invalid_request(source: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"chat template cannot render these messages: .") as caught:
        ChatTemplate(source).render(CHAT)
    assert caught.value.param == "messages"


@pytest.mark.parametrize("source", [None, {}])
def test_a_model_without_a_template_points_to_completions(source: Any) -> None:
    template = ChatTemplate(source)
    assert not template.exists
    assert not template.accepts_parts
    with pytest.raises(InvalidRequestError, match=r"no chat template.*/v1/completions"):
        template.render(CHAT)


def test_of_several_templates_the_default_is_used_and_tool_use_for_tools(tmp_path: Path, byte_level_dir: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    files = {"tokenizer.json": (byte_level_dir / "tokenizer.json").read_bytes()}
    files["tokenizer_config.json"] = repr({"chat_template": named}).replace("'", '"').encode()
    template = ChatTemplate.from_tokenizer(Tokenizer.from_files(files))
    assert (template.render(CHAT), template.render(CHAT, tools=TOOLS)) == ("plain", "tools")
    assert ChatTemplate({"default": "plain"}).render(CHAT, tools=TOOLS) == "plain"


def test_the_template_file_comes_before_the_config(byte_level_dir: Path) -> None:
    files = {name: (byte_level_dir / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    tokenizer = Tokenizer.from_files(files | {"chat_template.jinja": b"from the file"})
    assert ChatTemplate.from_tokenizer(tokenizer).render(CHAT) == "from the file"


def test_several_templates_without_a_default_are_refused() -> None:
    with pytest.raises(ModelError, match=r"called \"default\"; there are \['a', 'b'\]"):
        ChatTemplate({"b": "", "a": ""})


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ 'open",
        "{% endfor %}",
        "{{ x | no_such_filter }}",
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "[" * 90_000,
        "{% set _lorafleet_step = 1 %}",
        "{% macro _lorafleet_budget() %}{% endmacro %}",
        "{{ _lorafleet_step.__closure__[0].cell_contents.x }}",
    ],
    ids=range(10),
)
def test_a_template_that_does_not_compile_is_a_model_error(source: str) -> None:
    with pytest.raises(ModelError, match="chat template does not compile"):
        ChatTemplate(source)


# Limits of a template.


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__x = 1 %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(InvalidRequestError):
        ChatTemplate(source).render(CHAT)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for i in range(100001) %}{% endfor %}", "Range too big"),
        ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", "more than 2,000 steps"),
        ("{% macro m() %}{% endmacro %}{% for i in range(1500) %}{{ m() }}{% endfor %}", "more than 2,000 steps"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "(recursion|steps)"),
        ("{% for i in range(90) %}{{ 'x' * 90 }}{% endfor %}", "longer than 5,000 characters"),
        ("{{ 'x' * 5001 }}", "longer than 5,000"),
        ("{{ 5001 * [0] }}", "longer than 5,000"),
        ("{{ 9 ** 99999 }}", "bits"),
    ],
)
def test_a_runaway_template_is_stopped(monkeypatch: pytest.MonkeyPatch, source: str, reason: str) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 2_000)
    monkeypatch.setattr(template_sandbox, "MAX_PROMPT_CHARS", 5_000)
    with pytest.raises(InvalidRequestError, match=reason):
        ChatTemplate(source).render(CHAT)


BIG = "{% set x = 'x' * 9000000 %}{% set l = [x, x, x, x] %}{% set m = [l] * 9000 %}"


@pytest.mark.parametrize(
    "expression",
    [
        "x ~ x",
        "x + x",
        "l | join",
        "'' ~ m",
        "m | string",
        "m",
        "m | tojson",
        "{'a': m}",
        "x.replace('x', x)",
        "x | replace('x', 'yy')",
        "x.join(l)",
        "l | join(x)",
        "','.join(m | map('string'))",
        "'%s%s' % (x, x)",
        "'%1000000000d' % 1",
        "'%*d' % (1000000000, 1)",
        "'%s%s' | format(x, x)",
        "'{:1000000000}'.format(1)",
        "'{:{}}'.format(1, 1000000000)",
        "'{0}{0}'.format(x)",
        "'a' | center(1000000000)",
        "'a'.ljust(1000000000)",
        "'a'.zfill(1000000000)",
        "'a\n' | indent(1000000000, true)",
        "('a\n' * 90000) | indent(x)",
        "[1] | batch(1000000000, 1) | list",
        "'a\t'.expandtabs(1000000000)",
        "'x'.translate({120: x ~ ''})",
        "(1).to_bytes(1000000000, 'big')",
        "1.5 | round(100000000, 'ceil')",
        "[1] * 9000000",
        "range(90000) | map('string') | map('center', 10001) | list",
        "([[1] * 1000] * 60000) | sum(start=[]) | length",
        "lipsum(n=100000)",
        "9 ** 9 ** 9 ** 9 ** 9 ** 9",
    ],
)
def test_a_template_that_would_fill_memory_is_stopped_before(expression: str) -> None:
    """These would build a gigabyte or more, or take minutes, within the actual limits."""
    template = ChatTemplate(f"{BIG}{{{{ {expression} }}}}")
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequestError):
            template.render(CHAT)
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


def test_what_is_built_and_thrown_away_is_bounded_too() -> None:
    source = (
        "{% set ns = namespace(l=[]) %}{% for i in range(1000) %}{% set ns.l = ns.l + ['x' * 900000 ~ i] %}{% endfor %}"
    )
    with pytest.raises(InvalidRequestError, match="characters in all"):
        ChatTemplate(source).render(CHAT)


def test_a_rendering_has_so_much_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_RENDER_S", 0.05)
    source = "{% for i in range(90000) %}{% set x = range(90000) | sum %}{% endfor %}"
    with pytest.raises(InvalidRequestError, match=r"more than 0\.05 s"):
        ChatTemplate(source).render(CHAT)


def test_the_length_of_a_template_is_bounded() -> None:
    with pytest.raises(ModelError, match="1,000,000 characters; the limit is 131,072"):
        ChatTemplate("x" * 1_000_000)


def test_steps_are_counted_for_each_rendering_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 100)
    template = ChatTemplate("{% for i in range(60) %}{{ i }}{% endfor %}")
    assert template.render(CHAT) == template.render(CHAT)


def test_one_template_renders_on_several_threads_at_once(byte_level: Tokenizer) -> None:
    template = ChatTemplate.from_tokenizer(byte_level)
    chats = [[{"role": "user", "content": f"message {number} " * 50}] for number in range(8)]
    expected = [template.render(chat) for chat in chats]
    results: list[set[str]] = [set() for _ in chats]

    def work(number: int) -> None:
        for _ in range(50):
            results[number].add(template.render(chats[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(chats))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [{text} for text in expected]
