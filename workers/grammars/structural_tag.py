"""Structural tags: free text in which parts between tags follow grammars of their own, as tool calls do.

Owns: both forms that vLLM takes, as one grammar. `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`; and
`{"format": {"type": ...}}`, whose types are those of `_MAKERS`. Leaves to others: JSON schemas and regular expressions
in it (grammar_text.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from lorafleet.workers.errors import InvalidRequestError, quoted
from lorafleet.workers.grammars.grammar_text import json_schema_term, literal, regex_term

MAX_DEPTH: Final = 16
MAX_PARTS: Final = 1024


def structural_tag_grammar(tag: str | dict[str, Any], *, param: str = "structured_outputs") -> str:
    """Return the grammar of a structural tag, or of its JSON text. Raises `InvalidRequestError`."""
    if isinstance(tag, str):
        try:
            tag = json.loads(tag)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"{param}: the structural tag is not valid JSON: {error}.", param=param) from None
    if not isinstance(tag, dict):
        raise InvalidRequestError(f"{param}: the structural tag is {quoted(tag)}; give an object.", param=param)
    writer = _Writer(param)
    if "format" in tag:
        root = writer.part(tag["format"], 0)
    else:
        tags = [
            {"begin": entry.get("begin"), "content": {"type": "json_schema", "json_schema": entry.get("schema")}}
            | {"end": entry.get("end")}
            for entry in writer.objects(tag, "structures")
        ]
        root = writer.part({"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}, 0)
    return "\n".join([f"start: {root}", *writer.rules, ""])


class _Writer:
    """Writes the rules of one grammar."""

    def __init__(self, param: str) -> None:
        self.rules = [r"TEXT: /(.|\n)*/"]
        self._param = param
        self._num_parts = 0

    def part(self, part: Any, depth: int) -> str:
        """Return a part as an expression, after its rules."""
        self._num_parts += 1
        if depth > MAX_DEPTH or self._num_parts > MAX_PARTS:
            raise self._error(f"has over {MAX_PARTS} parts or is nested over {MAX_DEPTH} deep, the limits")
        kind = part.get("type") if isinstance(part, dict) else part
        make = _MAKERS.get(kind) if isinstance(kind, str) else None
        if make is None:
            raise self._error(f"has the type {quoted(kind)}; it must be one of {', '.join(_MAKERS)}")
        return make(self, part, depth)

    def objects(self, part: dict[str, Any], name: str) -> list[dict[str, Any]]:
        """Return a field that is a list of objects."""
        values = part.get(name)
        if not isinstance(values, list) or not values or not all(isinstance(value, dict) for value in values):
            raise self._error(f"has {name} {quoted(values)}; give a list of objects")
        return values

    def text(self, part: dict[str, Any], name: str, *, may_be_empty: bool = False) -> str:
        """Return a field that is a text."""
        value = part.get(name)
        if not isinstance(value, str) or not (value or may_be_empty):
            raise self._error(f"has {name} {quoted(value)}; give a text")
        return value

    def tag(self, part: dict[str, Any], depth: int, trigger: str = "") -> str:
        """Return a tag, of whose begin the trigger has been written already."""
        begin, end = self.text(part, "begin", may_be_empty=True), self.text(part, "end", may_be_empty=True)
        content = part.get("content")
        if isinstance(content, dict) and content.get("type") == "any_text":
            if not end:
                raise self._error("has a tag with any text and no end; give it an end")
            body = self.rule(f"TEXT {literal(end)}", lazy=True)
        else:
            body = " ".join([self.part(content, depth + 1), *([literal(end)] if end else [])])
        rest = begin.removeprefix(trigger)
        return f"({literal(rest)} {body})" if rest else f"({body})"

    def rule(self, expression: str, *, lazy: bool = False) -> str:
        """Return the name of a new rule."""
        name = f"part_{len(self.rules)}"
        self.rules.append(f"{name}{'[lazy]' if lazy else ''}: {expression}")
        return name

    def triggered(self, part: dict[str, Any], depth: int) -> str:
        """Return free text with tags: from a trigger on, one of the tags that begin with it must follow."""
        triggers, tags = part.get("triggers"), self.objects(part, "tags")
        if not isinstance(triggers, list) or not all(isinstance(trigger, str) and trigger for trigger in triggers):
            raise self._error(f"has triggers {quoted(triggers)}; give a list of texts")
        found: list[str] = []
        left = list(tags)
        for trigger in dict.fromkeys(triggers):
            own = [tag for tag in left if self.text(tag, "begin").startswith(trigger)]
            if not own:
                raise self._error(f"has the trigger {quoted(trigger)}, with which no tag begins")
            left = [tag for tag in left if tag not in own]
            until = self.rule(f"TEXT {literal(trigger)}", lazy=True)
            bodies = " | ".join(self.tag(tag, depth, trigger) for tag in own)
            found.append(f"{until} ({bodies})")
        if left:
            raise self._error(f"has the tag {quoted(left[0].get('begin'))}, which begins with no trigger")
        some = self.rule(" | ".join(found))
        if part.get("stop_after_first"):
            return some if part.get("at_least_one") else f"({some} | TEXT)"
        return f"{some}{'+' if part.get('at_least_one') else '*'} TEXT"

    def separated(self, part: dict[str, Any], depth: int) -> str:
        """Return tags with a separator between them."""
        tag = self.rule(" | ".join(self.tag(tag, depth) for tag in self.objects(part, "tags")))
        separator = literal(self.text(part, "separator"))
        many = tag if part.get("stop_after_first") else f"({tag} ({separator} {tag})*)"
        return many if part.get("at_least_one") else f"{many}?"

    def _error(self, what: str) -> InvalidRequestError:
        return InvalidRequestError(f"{self._param}: the structural tag {what}.", param=self._param)


def _sequence(writer: _Writer, part: dict[str, Any], depth: int) -> str:
    return " ".join(f"({writer.part(element, depth + 1)})" for element in writer.objects(part, "elements"))


def _one_of(writer: _Writer, part: dict[str, Any], depth: int) -> str:
    return "(" + " | ".join(writer.part(element, depth + 1) for element in writer.objects(part, "elements")) + ")"


_MAKERS: Final[dict[str, Callable[[_Writer, dict[str, Any], int], str]]] = {
    "const_string": lambda writer, part, depth: literal(writer.text(part, "value")),
    "json_schema": lambda writer, part, depth: json_schema_term(part.get("json_schema"), param=writer._param),
    "regex": lambda writer, part, depth: regex_term(writer.text(part, "pattern")),
    "any_text": lambda writer, part, depth: "TEXT",
    "sequence": _sequence,
    "or": _one_of,
    "tag": lambda writer, part, depth: writer.tag(part, depth),
    "triggered_tags": _Writer.triggered,
    "tags_with_separator": _Writer.separated,
}
