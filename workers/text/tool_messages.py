"""Tools, calls and their results as a chat template takes them.

A template that knows no tools gets them described in the system message, and calls and results as text, so that any
model can be given tools. Some templates take calls only in a form of their own.

Owns: these forms, and the checks of calls in messages. Leaves to others: rendering (chat_template.py), how calls are
written (workers/answers).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from lorafleet.workers.answers.call_syntax import CallSyntax, PythonicSyntax, WrittenCall
from lorafleet.workers.errors import InvalidRequestError, quoted
from lorafleet.workers.text.json_shape import check_shape

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]

_TEXT_ARGUMENTS = re.compile(r"""(?:\.arguments|\[['"]arguments['"]\])\s*\+""")  # which fails for an object
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolForm:
    """What a template takes.

    takes_tools: tools, as a variable. takes_tools_in_system: as the system message's `tools`, JSON text (Phi 4's).
    takes_calls: calls, and messages of the role tool. takes_short_ids: ids of calls must have nine letters or digits
    (Mistral's). takes_one_call: a message may have one call (Llama 3's). takes_system: a system message (Gemma 2's
    does not).
    """

    takes_tools: bool = False
    takes_tools_in_system: bool = False
    takes_calls: bool = False
    takes_short_ids: bool = False
    takes_one_call: bool = False
    takes_system: bool = True

    @classmethod
    def of(cls, template: str, *, takes_tools: bool, takes_system: bool = True) -> Self:
        """Return what a template's text asks for."""
        return cls(
            takes_tools=takes_tools,
            takes_tools_in_system=not takes_tools and "message['tools']" in template,
            takes_calls="tool_calls" in template and not _TEXT_ARGUMENTS.search(template),
            takes_short_ids="length 9" in template,
            takes_one_call="single tool-calls" in template,
            takes_system=takes_system,
        )

    def messages(
        self, messages: Sequence[Message], tools: Tools | None, syntax: CallSyntax | PythonicSyntax
    ) -> tuple[Sequence[Message], Tools | None]:
        """Return messages and tools for the template. syntax: how the model writes calls.

        Raises InvalidRequestError for calls that are not OpenAI's.
        """
        if not _is_conversation(messages):
            return messages, tools  # which rendering refuses
        for number, message in enumerate(messages):
            _check_calls(message, number)
        has_calls = any(message.get("role") == "tool" or "tool_calls" in message for message in messages)
        if has_calls and not self.takes_calls:
            messages = list(_as_text(messages, syntax))
        elif has_calls:
            messages = _with_names([_without_empty_calls(message) for message in messages])
            if self.takes_one_call:
                messages = _one_call_each(messages)
            if self.takes_short_ids:
                messages = [_with_short_ids(message) for message in messages]
        if not tools or self.takes_tools:
            return messages, tools
        if self.takes_tools_in_system:
            return _put_in_system(messages, tools), None
        return _describe(messages, tools, syntax, takes_system=self.takes_system), None


def _is_conversation(messages: object) -> bool:
    is_list = isinstance(messages, Sequence) and len(messages) > 0
    return is_list and all(isinstance(message, Mapping) for message in messages)  # type: ignore[attr-defined]


def _check_calls(message: Message, number: int) -> None:
    calls = message.get("tool_calls")
    if calls is None:
        return
    place = f"messages[{number}].tool_calls"
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise InvalidRequestError(f"{place} must be a list, not {type(calls).__name__}.", param="messages")
    for index, call in enumerate(calls):
        kind = call.get("type", "function") if isinstance(call, Mapping) else None
        function = call.get("function") if isinstance(call, Mapping) else None
        if kind not in ("function", None) or not isinstance(function, Mapping):
            raise InvalidRequestError(
                f'{place}[{index}] must be an object of the type "function" with a function.', param="messages"
            )
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str) or not name:
            raise InvalidRequestError(
                f"{place}[{index}].function.name is {quoted(name)}; it must be a name.", param="messages"
            )
        if arguments is not None and not isinstance(arguments, str | Mapping):
            raise InvalidRequestError(
                f"{place}[{index}].function.arguments must be JSON text, not {type(arguments).__name__}.",
                param="messages",
            )


def _without_empty_calls(message: Message) -> Message:
    if message.get("tool_calls") or "tool_calls" not in message:
        return message
    return {key: value for key, value in message.items() if key != "tool_calls"}


def _with_names(messages: Sequence[Message]) -> list[Message]:
    """Return messages in which each result has its function's name, which some templates insist on."""
    names: dict[Any, str] = {}
    named: list[Message] = []
    for message in messages:
        names |= {str(call.get("id")): call["function"]["name"] for call in message.get("tool_calls") or ()}
        name = names.get(str(message.get("tool_call_id"))) if message.get("role") == "tool" else None
        named.append({**message, "name": name} if name is not None and message.get("name") is None else message)
    return named


def _one_call_each(messages: Sequence[Message]) -> list[Message]:
    """Return messages with one call each, every call with its result after it."""
    results = {str(message.get("tool_call_id")): message for message in messages if message.get("role") == "tool"}
    moved: set[str] = set()
    single: list[Message] = []
    for message in messages:
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            if message.get("role") != "tool" or str(message.get("tool_call_id")) not in moved:
                single.append(message)
            continue
        for index, call in enumerate(calls):
            single.append({**message, "tool_calls": [call]} | ({"content": ""} if index else {}))
            call_id = str(call.get("id"))
            if call_id in results and call_id not in moved:
                single.append(results[call_id])
                moved.add(call_id)
    return single


def _with_short_ids(message: Message) -> Message:
    changed = dict(message)
    if message.get("tool_calls"):
        changed["tool_calls"] = [{**call, "id": _short_id(call.get("id"))} for call in message["tool_calls"]]
    if message.get("tool_call_id") is not None:
        changed["tool_call_id"] = _short_id(message["tool_call_id"])
    return changed


def _short_id(call_id: object) -> str:
    text = str(call_id)
    return text if _SHORT_ID.fullmatch(text) else hashlib.sha256(text.encode(errors="replace")).hexdigest()[:9]


def _put_in_system(messages: Sequence[Message], tools: Tools) -> list[Message]:
    """Return messages of which the first is a system message with the tools' functions."""
    text = json.dumps([tool.get("function", tool) for tool in tools], ensure_ascii=False)
    first = messages[0]
    if first.get("role") == "system":
        return [{**first, "tools": text}, *messages[1:]]
    return [{"role": "system", "content": "", "tools": text}, *messages]


def _describe(
    messages: Sequence[Message], tools: Tools, syntax: CallSyntax | PythonicSyntax, *, takes_system: bool
) -> list[Message]:
    """Return messages of which the first describes the tools: a system message, or the user's if there may be none."""
    functions = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    example = syntax.text([WrittenCall("function_name", {"argument_name": "value"})])
    text = (
        f"You may call these functions, which are described as JSON:\n{functions}\n\n"
        "If a call helps to answer, write calls, and nothing after them, in this form:\n"
        f"{example}\nOtherwise answer without a call."
    )
    first, rest = messages[0], messages[1:]
    content = first.get("content")
    if first.get("role") not in ("system", "developer"):
        if takes_system or first.get("role") != "user" or not isinstance(content, str):
            return [{"role": "system", "content": text}, *messages]
        return [{**first, "content": f"{text}\n\n{content}"}, *rest]
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [{**first, "content": [*content, {"type": "text", "text": text}]}, *rest]
    return [{**first, "content": f"{content}\n\n{text}" if content else text}, *rest]


def _as_text(messages: Sequence[Message], syntax: CallSyntax | PythonicSyntax) -> Iterator[Message]:
    """Yield messages with calls as the assistant's text and results as the user's."""
    results: list[str] = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role == "tool":
            results.append(f"<tool_response>\n{_plain_text(content)}\n</tool_response>")
            continue
        if results and role == "user" and isinstance(content, str):
            yield {**message, "content": "\n".join([*results, content])}
            results = []
            continue
        if results:
            yield {"role": "user", "content": "\n".join(results)}
            results = []
        calls = message.get("tool_calls")
        if not calls:
            yield _without_empty_calls(message)
            continue
        text = syntax.text([WrittenCall(call["function"]["name"], _arguments(call["function"])) for call in calls])
        kept = {key: value for key, value in message.items() if key != "tool_calls"}
        yield {**kept, "content": "\n".join(filter(None, [_plain_text(content), text]))}
    if results:
        yield {"role": "user", "content": "\n".join(results)}


def _arguments(function: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = function.get("arguments") or {}
    if isinstance(arguments, Mapping):
        return arguments
    check_shape(arguments.encode(errors="replace"), "The arguments of a tool call", param="messages")
    try:
        values = json.loads(arguments)
    except ValueError:
        values = arguments
    return values if isinstance(values, dict) else {"arguments": arguments}


def _plain_text(content: object) -> str:
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "\n".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""
