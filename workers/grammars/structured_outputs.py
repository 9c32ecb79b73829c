"""Structured output as callers ask for it: `StructuredOutputsParams`, with vLLM's names and meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafleet.workers.errors import InvalidRequestError, quoted
from lorafleet.workers.grammars.grammar_text import (
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from lorafleet.workers.grammars.structural_tag import structural_tag_grammar

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What an output must be: exactly one of the first fields. Raises `InvalidRequestError`.

    json: a JSON schema, or its text. regex: matches the whole output. choice: the output is one of these. grammar: Lark
    or GBNF. json_object: any JSON object. structural_tag: free text with parts that follow grammars, see
    structural_tag.py. The others are for JSON. whitespace_pattern: a regular expression of the blanks between its
    tokens. disable_any_whitespace: none. disable_additional_properties: an object has only its schema's properties,
    unless that says otherwise.
    """

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False

    def __post_init__(self) -> None:
        kinds = [
            kind for kind in _KINDS if getattr(self, kind) not in (None, False) or (kind, self.json) == ("json", False)
        ]
        if len(kinds) != 1:
            given = f"has {' and '.join(kinds)}" if kinds else "asks for nothing"
            raise InvalidRequestError(
                f"structured_outputs {given}. Give one of {', '.join(_KINDS)}.", param="structured_outputs"
            )
        if not isinstance(self.whitespace_pattern, str | None):
            raise InvalidRequestError(
                f"whitespace_pattern is {quoted(self.whitespace_pattern)}; it must be a text.",
                param="structured_outputs",
            )

    def grammar_text(self, *, param: str = "structured_outputs") -> str:
        """Return the grammar, unchecked. param: the field that errors name."""
        whitespace = "" if self.disable_any_whitespace else self.whitespace_pattern
        if self.regex is not None:
            return regex_grammar(self.regex, param=param)
        if self.choice is not None:
            return choice_grammar(self.choice, param=param)
        if self.grammar is not None:
            return lark_grammar(self.grammar, param=param)
        if self.structural_tag is not None:
            return structural_tag_grammar(self.structural_tag, param=param)
        if self.json is not None:
            return json_schema_grammar(
                self.json,
                param=param,
                whitespace=whitespace,
                allows_more_properties=not self.disable_additional_properties,
            )
        return json_object_grammar(whitespace=whitespace)


def default_grammar(fields: Mapping[str, Any]) -> str:
    """Return the grammar of a profile's structured_outputs, unchecked. Raises `InvalidRequestError`."""
    try:
        return StructuredOutputsParams(**fields).grammar_text()
    except TypeError as error:
        known = ", ".join(field.name for field in dataclasses.fields(StructuredOutputsParams))
        raise InvalidRequestError(
            f"structured_outputs has {quoted(sorted(fields))}; it may have {known}.", param="structured_outputs"
        ) from error
