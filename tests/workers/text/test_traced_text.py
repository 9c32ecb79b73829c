"""Content is upper case in these tests and a template's own text is not, so each character says whose it is."""

from __future__ import annotations

import json

import pytest

from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.text import ChatTemplate
from lorafleet.workers.text.template_sandbox import Environment
from lorafleet.workers.text.traced_text import (
    MAX_PIECES,
    TracedText,
    content_of,
    has_content,
    join_texts,
    text_of,
    written,
)

EXACT = [
    "<{{ c }}>",
    "{{ '<' + c + '>' }}",
    "{{ '<' ~ c ~ '>' }}{{ 7 ~ c }}",
    "{{ c * 2 }}{{ ('a' + c) * 2 }}{{ 2 * ('-' ~ c) }}",
    "{{ c | trim }}|{{ ('  a ' + c + ' ') | trim }}|{{ ('a' ~ c).lstrip('ab') }}|{{ (c ~ 'b').rstrip('b') }}",
    "{{ c[2:-1] }}{{ ('ab' + c)[1:5] }}{{ c[1] }}{{ ('ab' + c)[::2] | length }}",
    "{% for part in c.split('-') %}[{{ part }}]{% endfor %}{{ ('a-' + c).split('-')[-1] }}",
    "{% for part in ('a, ' ~ c ~ ', b').split(', ') %}[{{ part }}]{% endfor %}",
    "{% for word in (' a ' ~ c).split() %}[{{ word }}]{% endfor %}{{ ('a b' ~ c).rsplit(none, 1) | join('+') }}",
    "{% for line in (c ~ '\nb\r\n' ~ c).splitlines() %}[{{ line }}]{% endfor %}",
    "{{ ('a=' ~ c).partition('=') | join('|') }}{{ ('a=' ~ c).rpartition('=')[2] }}",
    "{{ c.replace('-', '+') }}{{ c | replace('B', 'b') }}{{ 'axa'.replace('x', c) }}{{ 'axa' | replace('x', c) }}",
    "{{ ('a' ~ c).removeprefix('a') }}{{ (c ~ 'a').removesuffix('a') }}",
    "{{ [c, 'a', c] | join(', ') }}{{ ', '.join([c, 'a']) }}{{ ['a', 'b'] | join(c) }}{{ c.join(['a', 'b']) }}",
    "{{ messages | map(attribute='content') | join(';') }}{{ messages | join(';', attribute='content') }}",
    "{{ '%s=%s' % ('a', c) }}{{ '<%s>' % c }}{{ '%s' | format(c) }}{{ '%(x)s' | format(x=c) }}",
    "{{ '{}={x}'.format(c, x='a') }}{{ 'a{0}'.format(c) }}",
    "{{ {'a': [c, {'b': c}]} | tojson }}{{ messages | map(attribute='content') | list | tojson(indent=2) }}",
    "{{ ['a', c] }}{{ {'a': c} ~ 'b' }}{{ ['a', c] | string }}",
    "{% macro show(x) %}<{{ x }}>{% endmacro %}{{ show(c) }}{{ show('a') ~ c }}",
    "{% macro box() %}<{{ caller() }}>{% endmacro %}{% call box() %}a{{ c }}{% endcall %}",
    "{% set x %}a{{ c }}b{% endset %}{{ x | trim }}{{ x[1:] }}",
    "{% set ns = namespace(t='') %}"
    "{% for m in messages %}{% set ns.t = ns.t ~ m.role ~ m.content %}{% endfor %}{{ ns.t }}",
    "{{ c | default('a') }}{{ missing | default('a') }}{{ [c] | first }}{{ ('a' ~ c) | last }}{{ c | reverse }}",
    "{% for letter in 'a' ~ c %}{{ letter }}.{% endfor %}",
    "{% filter trim %} a{{ c }} {% endfilter %}",
    "{{ messages[0]['content'] }}{{ messages[0].role }}{{ x }}{{ tools[0].function.name }}{{ documents[0]['title'] }}",
    "{{ 'a' if c == 'AB-CD' else 'b' }}{{ 'a' if 'B' in c }}{{ c | length }}{{ {'AB-CD': 'a'}[c] }}",
    "{{ bos_token }}{{ c }}{{ eos_token }}",
]


def _render(source: str, content: str = "AB-CD") -> TracedText:
    return ChatTemplate("{% set c = messages[0].content %}" + source).render(
        [{"role": "user", "content": content}, {"role": "assistant", "content": "E F"}],
        tools=[{"function": {"name": "TOOL"}}],
        documents=[{"title": "DOC"}],
        chat_template_kwargs={"x": "X Y"},
        bos_token="<s>",
        eos_token="</s>",
    )


@pytest.mark.parametrize("source", EXACT)
def test_each_character_of_a_prompt_is_known_to_be_content_or_not(source: str) -> None:
    text = _render(source)
    marked = {position for begin, end in content_of(text) for position in range(begin, end)}
    wrong = [
        (position, letter)
        for position, letter in enumerate(text)
        if (letter.isupper() and position not in marked) or (letter.islower() and position in marked)
    ]
    assert not wrong, (text, content_of(text))


METHODS = [name for name in dir(str) if not name.startswith("_")]


@pytest.mark.parametrize("name", sorted(Environment().filters))
def test_no_filter_makes_content_the_templates(name: str) -> None:
    for arguments in ("", "('a')", "('a', 'b')", "(c)", "('a', c)", "(9)", "(9, c)", "(c, c)"):
        for value in ("c", "('a' ~ c)", "[c, c]", "{c: c}", "{'a': c}", "messages", "'a'", "'%s'", "1"):
            _check_covers("{{ " + f"{value} | {name}{arguments}" + " }}")


@pytest.mark.parametrize("name", METHODS)
def test_no_method_makes_content_the_templates(name: str) -> None:
    for value in ("c", "('a' ~ c)", "'a{}'", "'a'"):
        for arguments in ("", "'a'", "c", "'a', c", "c, 'a'", "[c, c]", "9", "9, c", "9, 'X'"):
            _check_covers("{{ " + f"{value}.{name}({arguments})" + " }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].items() }}",
        "{{ messages[0].values() ~ 'a' }}",
        "{{ namespace(x=c) }}",
        "{{ [namespace(x=c)] | join }}",
        "{{ namespace(x=c) | string }}",
        "{{ c | e }}{{ c | safe }}{{ (c | safe) + 'a' }}",
    ],
)
def test_an_object_that_may_hold_content_is_content(source: str) -> None:
    assert "ZWZ" in _render(source, "ZWZ")
    _check_covers(source)


def _check_covers(source: str) -> None:
    """Every upper-case letter that comes from the content must be marked."""
    try:
        text = _render(source, "ZWZ")
    except InvalidRequestError:
        return
    marked = {position for begin, end in content_of(text) for position in range(begin, end)}
    assert all(position in marked for position, letter in enumerate(text) if letter in "ZWzw"), (source, text)


def test_it_is_the_string_that_it_holds() -> None:
    text = TracedText("a b")
    assert text == "a b" and hash(text) == hash("a b") and {"a b": 1}[text] == 1
    assert isinstance(str(text), TracedText) and json.dumps({text: text}) == '{"a b": "a b"}'
    assert [text.split(), text.split(" ", 1), text.rsplit(" "), text.partition(" ")] == [
        ["a", "b"],
        ["a", "b"],
        ["a", "b"],
        ("a", " ", "b"),
    ]
    assert (text.upper(), text.title(), text.capitalize(), text.strip("a"), text[::-1]) == (
        "A B",
        "A B",
        "A b",
        " b",
        "b a",
    )


def test_neighbouring_content_is_one_span() -> None:
    text = join_texts([TracedText("ab"), TracedText(""), TracedText("c"), "-", TracedText("d")])
    assert content_of(text) == ((0, 3), (4, 5))
    assert content_of(text[1:5]) == ((0, 2), (3, 4))


def test_what_cannot_be_traced_is_all_content() -> None:
    assert content_of(TracedText("a", ()) + "ß") == ()
    assert content_of((TracedText("ß") + "a").upper()) == ((0, 3),)  # one letter became two
    assert content_of((TracedText("ab") + "c")[::-1]) == ((0, 3),)
    for source in ("{{ '%.3s' % c }}", "{{ '%9s' | format(c) }}", "{{ '{:.2}'.format(c) }}", "{{ '{:>9}'.format(c) }}"):
        text = _render(source)
        assert (text, content_of(text)) == (text, ((0, len(text)),))
    assert (_render("{{ '%.3s' % c }}"), _render("{{ '{:>7}'.format(c) }}")) == ("AB-", "  AB-CD")
    assert content_of(_render("{{ {c: 1, 'a': 2} | tojson(sort_keys=true) }}"))
    assert content_of(_render("{{ strftime_now(c) }}")) == ((0, 5),)


def test_tracing_costs_no_more_than_its_bound() -> None:
    text = "a" + TracedText(" b" * (MAX_PIECES + 1))
    assert content_of(text.replace("b", "c")) == ((0, len(text)),)
    assert all(content_of(piece) for piece in text.split())
    many = join_texts([TracedText("a"), "b "] * MAX_PIECES)
    assert [content_of(piece) for piece in many.split(" ", 3)[:3]] == [((0, 1),)] * 3
    assert sum(len(content_of(letter)) for letter in many) == MAX_PIECES == sum(map(len, map(content_of, many.split())))
    letters = list(TracedText("ab" * 100_000))
    assert len(letters) == 200_000 and len({*map(id, letters)}) == 2


def test_quoted_text_stays_traced() -> None:
    text = written(json.dumps, {TracedText("k"): ["a", TracedText('"ü\n')], "b": (1, None)})
    assert text == r'{"k": ["a", "\"\u00fc\n"], "b": [1, null]}'
    assert [text[begin:end] for begin, end in content_of(text)] == ["k", r"\"\u00fc\n"]
    assert text_of([TracedText("a"), 1]) == "['a', 1]"


def test_content_is_found_deep_in_a_value() -> None:
    assert has_content({"a": [({"b": TracedText("c")},)]})
    assert has_content({TracedText("a"): 1})
    assert not has_content({"a": ["b", TracedText(""), TracedText("c", ())]})
