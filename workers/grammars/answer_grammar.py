"""The grammar of a chat's answer: reasoning first, then calls, or content in a grammar of its own, or either.

Owns: how these are put together. Leaves to others: content's grammar and JSON schemas (grammar_text.py), how a family
writes calls and reasoning (workers/answers).

A mark may be one token of the vocabulary, which text in a grammar does not match; then both are allowed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lorafleet.workers.answers.call_syntax import CallSyntax
from lorafleet.workers.answers.reasoning import ReasoningFormat
from lorafleet.workers.grammars.grammar_text import json_schema_term, literal

_BLANKS = r"(/[ \n]{1,8}/)?"

# With one of these a schema may describe properties elsewhere.
_SAYS_MORE = frozenset(
    {"$ref", "additionalProperties", "allOf", "anyOf", "oneOf", "patternProperties", "unevaluatedProperties"}
)

TokenOf = Callable[[str], int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRules:
    """The calls that an answer may consist of: of functions, each a name and the JSON schema of its arguments.

    is_strict: keywords of a schema that cannot be enforced are refused, not left out. marks: texts in `syntax` that may
    be tokens.
    """

    functions: Sequence[tuple[str, dict[str, Any] | None, bool]]
    syntax: CallSyntax
    marks: Sequence[str]
    takes_several: bool


def answer_grammar(
    *,
    content: str = "",
    calls: CallRules | None = None,
    reasoning: ReasoningFormat | None = None,
    is_open: bool | None = None,
    token_of: TokenOf = lambda text: None,
    param: str = "tools",
) -> str:
    """Return the grammar. content: of content, in Lark; with `calls` too the answer is either.

    is_open: whether the prompt has begun the reasoning (see `ReasoningFormat.is_open`). token_of: returns the token
    whose text is a mark. param: the field that errors about schemas name.
    """
    bodies = (["calls"] if calls is not None else []) + (["content"] if content else [])
    rules = [] if calls is None else list(_calls(calls, token_of, param))
    if content:
        rules.append(f"content: %lark {{\n{content}\n}}")
    thought = "" if reasoning is None or is_open is False else "thought "
    if reasoning is not None and thought:
        is_sure = reasoning.is_implied if is_open is None else is_open
        begin = f"({' | '.join(_mark(mark, token_of) for mark in reasoning.begin)})"
        thought = f"{begin}? thought " if is_sure else f"({begin} thought)? "
        rules += _thought(reasoning.end, token_of)
    return "\n".join([f"start: {thought}({' | '.join(bodies)})", *rules, ""])


def _thought(ends: Iterable[str], token_of: TokenOf) -> Iterator[str]:
    """Yield the rules of text up to a closing mark."""
    names = []
    for number, end in enumerate(ends):
        names.append(f"thought_{number}")
        yield f"thought_{number}[suffix={literal(end)}]: /(?s:.*)/"
        if (token := token_of(end)) is not None:
            names.append(f"(/(?s:.+)/)? <[{token}]>")
    yield f"thought: ({' | '.join(names)}) {_BLANKS}"


def _calls(calls: CallRules, token_of: TokenOf, param: str) -> Iterator[str]:
    syntax = calls.syntax

    def terms(text: str) -> str:
        marks = [mark for mark in calls.marks if mark in text]
        pieces = re.split(f"({'|'.join(map(re.escape, marks))})", text) if marks else [text]
        return " ".join(_mark(piece, token_of) if piece in marks else literal(piece) for piece in pieces if piece)

    following = f" ({terms(syntax.between)} call)*" if calls.takes_several else ""
    yield f"calls: {terms(syntax.begin)} call{following} {terms(syntax.end)}"
    names = [f"call_{number}" for number in range(len(calls.functions))]
    yield f"call: {terms(syntax.before)} ({' | '.join(names)}) {terms(syntax.after)}"
    for rule, (name, schema, is_strict) in zip(names, calls.functions, strict=True):
        head = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{syntax.arguments}": '
        yield f"{rule}: {literal(head)} {rule}_arguments {literal('}')}"
        yield f"{rule}_arguments: {json_schema_term(_of_object(schema), param=param, is_strict=is_strict)}"


def _of_object(schema: dict[str, Any] | None) -> dict[str, Any]:
    """Return a schema that only objects fit: a function has no other arguments, unless its schema says so."""
    whole = {"type": "object", "properties": {}} | (schema or {})
    return whole if _SAYS_MORE.intersection(whole) else whole | {"additionalProperties": False}


def _mark(text: str, token_of: TokenOf) -> str:
    token = token_of(text)
    return literal(text) if token is None else f"({literal(text)} | <[{token}]>)"
