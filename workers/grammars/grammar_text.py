"""Grammar texts: a JSON schema, a regular expression, a list of choices, Lark or GBNF as one text.

Owns: each kind's text, and what of a JSON schema is left out of it. Leaves to others: whether the result compiles
(check.py), structural tags (structural_tag.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

from lorafleet.workers.errors import InvalidRequestError, quoted

JsonSchema: TypeAlias = dict[str, Any] | bool

MAX_DEPTH: Final = 64
"""Maximum nesting of a JSON schema."""
MAX_CHOICES: Final = 4096

_WHITESPACE: Final = r"[\x20\x0A\x0D\x09]{1,64}"  # bounded, so that a document cannot go on blank for ever
# Formats that are enforced. In JSON Schema any other is an annotation.
_FORMATS: Final = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)
_DATA: Final = frozenset({"const", "enum", "default", "examples", "example"})  # their values are data, not schemas


def json_schema_grammar(
    schema: JsonSchema | str,
    *,
    param: str = "structured_outputs",
    is_strict: bool = True,
    whitespace: str | None = None,
    allows_more_properties: bool = True,
) -> str:
    """Return the grammar of the documents that a schema, or its JSON text, describes. See `json_schema_term`."""
    term = json_schema_term(
        schema,
        param=param,
        is_strict=is_strict,
        whitespace=whitespace,
        allows_more_properties=allows_more_properties,
    )
    return f"start: {term}\n"


def json_schema_term(
    schema: JsonSchema | str | None,
    *,
    param: str = "structured_outputs",
    is_strict: bool = True,
    whitespace: str | None = None,
    allows_more_properties: bool = True,
) -> str:
    """Return the documents that a schema, or its JSON text, describes as a term of a grammar.

    param: the field that errors name. is_strict: keywords that cannot be enforced are refused, by the check; otherwise
    they are left out. whitespace: the regular expression of blanks between tokens, empty for none; by default any, up
    to 64 characters. allows_more_properties: objects whose schema does not say so may have further ones.
    """
    if isinstance(schema, str):
        schema = _parsed(schema, param)
    if not isinstance(schema, dict | bool):
        raise InvalidRequestError(f"{param}: the JSON schema is {quoted(schema)}; it must be an object.", param=param)
    plain = _plain(schema, param, allows_more_properties)
    root = plain if isinstance(plain, dict) else {} if plain else {"not": {}}
    options: dict[str, Any] = {"whitespace_pattern": _WHITESPACE if whitespace is None else whitespace}
    if whitespace == "":
        options = {"whitespace_flexible": False}
    if not is_strict:
        options |= {"lenient": True, "coerce_one_of": True}
    return f"%json {json.dumps(root | {'x-guidance': options}, ensure_ascii=False)}"


def json_object_grammar(*, whitespace: str | None = None) -> str:
    """Return the grammar of all JSON objects."""
    return json_schema_grammar({"type": "object"}, whitespace=whitespace)


def regex_grammar(pattern: str, *, param: str = "structured_outputs") -> str:
    """Return the grammar of the texts that a regular expression matches as a whole."""
    if not isinstance(pattern, str) or not pattern:
        raise InvalidRequestError(f"{param}: the regular expression is {quoted(pattern)}; give a text.", param=param)
    return f"start: {regex_term(pattern)}\n"


def choice_grammar(choices: Sequence[str], *, param: str = "structured_outputs") -> str:
    """Return the grammar of some texts."""
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise InvalidRequestError(f"{param}: the choices are {quoted(choices)}; give a list of texts.", param=param)
    if len(choices) > MAX_CHOICES:
        raise InvalidRequestError(
            f"{param} has {len(choices)} choices; the limit is {MAX_CHOICES}. Give fewer.", param=param
        )
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise InvalidRequestError(f"{param} has the choice {quoted(choice)}; give a text.", param=param)
    return f"start: {' | '.join(map(literal, dict.fromkeys(choices)))}\n"


def lark_grammar(text: str, *, param: str = "structured_outputs") -> str:
    """Return a caller's grammar, in Lark or GBNF. The check turns GBNF into Lark."""
    if not isinstance(text, str) or not text.strip():
        raise InvalidRequestError(f"{param}: the grammar is {quoted(text)}; give a text.", param=param)
    return text


def literal(text: str) -> str:
    """Return a text as a term of a grammar."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # which Lark's reader does not take as it is


def regex_term(pattern: str) -> str:
    """Return a regular expression, matched as a whole, as a term of a grammar."""
    import llguidance  # 40 ms, for those who need it

    return f"/{llguidance.regex_to_lark(_without_anchors(pattern))}/"


def _without_anchors(pattern: str) -> str:
    """Drop `^` at the start and `$` at the end, which mean nothing where the whole text must match."""
    pattern = pattern.removeprefix("^")
    if pattern.endswith("$"):
        body = pattern[:-1]
        if (len(body) - len(body.rstrip("\\"))) % 2 == 0:
            return body
    return pattern


def _parsed(text: str, param: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{param}: the JSON schema is not valid JSON: {error}.", param=param) from None


def _plain(schema: Any, param: str, allows_more: bool, depth: int = 0) -> Any:
    """Return a schema without unknown formats and options of the compiler."""
    if depth > MAX_DEPTH:
        raise InvalidRequestError(f"{param}: the JSON schema is nested over {MAX_DEPTH} deep, the limit.", param=param)
    if isinstance(schema, list):
        return [_plain(item, param, allows_more, depth + 1) for item in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {
        key: value if key in _DATA else _plain(value, param, allows_more, depth + 1)
        for key, value in schema.items()
        if key != "x-guidance" and not (key == "format" and isinstance(value, str) and value not in _FORMATS)
    }
    if not allows_more and isinstance(plain.get("properties"), dict):
        plain.setdefault("additionalProperties", False)
    return plain
