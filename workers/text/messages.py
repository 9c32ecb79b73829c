"""A chat's messages as templates take them.

Owns: what clients send (parts, nulls, old names of a role) turned into what a template reads, and marking all text of
it as a request's. Leaves to others: rendering (chat_template.py), which roles the HTTP API takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lorafleet.workers.errors import InvalidRequestError, quoted
from lorafleet.workers.text.json_shape import MAX_DEPTH, check_shape
from lorafleet.workers.text.traced_text import TracedText

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
"""Roles of OpenAI's API. A template may make control tokens of them."""

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_TEXTS_OF_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


@dataclass(frozen=True, slots=True)
class TemplateForm:
    """What one template reads. accepts_parts: lists of parts as content. wants_parts: nothing else. has_developer: the
    role; without it, such messages are the system's."""

    accepts_parts: bool
    wants_parts: bool
    has_developer: bool


def renewed(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message of OpenAI's first function calls as one of today's: a function's result is a tool's, and an
    assistant's function call is its tool call."""
    call = message.get("function_call")
    if message.get("role") == "function":
        content = message.get("content")
        result = {"role": "tool", "content": "" if content is None else content}
        return {**message, **result, "tool_call_id": _call_id(message.get("name"))}
    if message.get("role") == "assistant" and isinstance(call, Mapping) and not message.get("tool_calls"):
        calls = [{"id": _call_id(call.get("name")), "type": "function", "function": call}]
        return {**{key: value for key, value in message.items() if key != "function_call"}, "tool_calls": calls}
    return message


def _call_id(name: object) -> str:
    return f"call_{name}"


def template_messages(messages: Sequence[Mapping[str, Any]], form: TemplateForm) -> list[dict[str, Any]]:
    """Return a template's messages: plain JSON values, of which a null counts as absent; content as the template's form
    wants it; an assistant's without content with an empty one; the arguments of tool calls as objects. See `renewed`.

    Raises InvalidRequestError, also for a content part that is not text.
    """
    return [_message(message, f"messages[{number}]", form) for number, message in enumerate(messages)]


def _message(message: Mapping[str, Any], place: str, form: TemplateForm) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{place} must be an object, not {type(message).__name__}.", param="messages")
    message = {key: value for key, value in renewed(message).items() if value is not None}
    plain = {given(key): value if key == "content" else given(value) for key, value in message.items()}
    role = plain.get("role")
    if role in ROLES:
        is_system = role == "developer" and not form.has_developer
        plain["role"] = "system" if is_system else ROLES[ROLES.index(role)]  # not traced
    if role == "assistant":
        plain.setdefault("content", plain.get("refusal", ""))
        if "audio" in plain:
            raise InvalidRequestError(f"{place}.audio is given; this server takes text only.", param="messages")
    if "content" in plain:
        plain["content"] = _content(plain["content"], f"{place}.content", form)
    if not plain.get("tool_calls", True):
        del plain["tool_calls"]  # none, which templates take for some
    if "tool_calls" in plain:
        plain["tool_calls"] = _parse_arguments(plain["tool_calls"])
    reasoning = next((plain[field] for field in _REASONING_FIELDS if field in plain), None)
    if reasoning is not None:  # templates use different names for it
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _content(content: Any, place: str, form: TemplateForm) -> Any:
    if isinstance(content, str):
        text = TracedText(content)
        return [{"type": "text", "text": text}] if form.wants_parts else text
    if isinstance(content, list | tuple):
        texts = _texts(content, place)
        if form.accepts_parts:
            return [{"type": "text", "text": TracedText(text)} for text in texts]
        return TracedText("\n".join(texts))
    raise InvalidRequestError(
        f"{place} must be a string or a list of parts, not {type(content).__name__}.", param="messages"
    )


def content_text(content: str | Sequence[Any]) -> str:
    """Return content as a template without parts reads it. Raises InvalidRequestError for a part that is not text."""
    return content if isinstance(content, str) else "\n".join(_texts(content, "content"))


def _texts(parts: Sequence[Any], place: str) -> list[str]:
    return [_part_text(part, f"{place}[{number}]") for number, part in enumerate(parts)]


def _part_text(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get(_TEXTS_OF_PARTS.get(kind)) if isinstance(part, Mapping) and isinstance(kind, str) else None
    if not isinstance(text, str):
        raise InvalidRequestError(
            f"{place} has the type {quoted(kind)}; this server takes text only, in parts of the form "
            '{"type": "text", "text": "..."}.',
            param="messages",
        )
    return text


def _parse_arguments(tool_calls: Any) -> Any:
    """Parse the calls' arguments, JSON text in OpenAI's API, to the objects templates print. Other text stays."""
    for call in tool_calls if isinstance(tool_calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            text = function["arguments"] or "{}"
            check_shape(text.encode(errors="replace"), "The arguments of a tool call", param="messages")
            try:
                arguments = json.loads(text)
            except ValueError:
                continue
            if isinstance(arguments, dict):
                function["arguments"] = given(arguments)
    return tool_calls


def given(value: Any, param: str = "messages", depth: int = 0) -> Any:
    """Return a fresh copy in pure JSON types, all of whose text is traced as a request's.

    A template gets no object with methods of ours. Raises InvalidRequestError for what is not JSON.
    """
    if isinstance(value, str):
        return TracedText(value)
    if value is None or type(value) in (int, float, bool):
        return value
    if depth == MAX_DEPTH:
        raise InvalidRequestError(f"{param} is nested too deep; the limit is {MAX_DEPTH}.", param=param)
    if isinstance(value, Mapping):
        return {TracedText(str(key)): given(item, param, depth + 1) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return [given(item, param, depth + 1) for item in value]
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    raise InvalidRequestError(
        f"A value for the chat template must be plain JSON, not {type(value).__name__}.", param=param
    )
