"""The tools of a chat request: which of them may be called, must be called, and how many calls there may be.

Owns: the checks of `tools` and `tool_choice`. Leaves to others: their place in the prompt
(workers/text/tool_messages.py), reading calls (answer_form.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from lorafleet.controller.gateway.api.schema import ChatRequest, Tool
from lorafleet.workers.errors import InvalidRequestError, quoted

MAX_TOOLS: Final = 1024
MAX_NAME_CHARS: Final = 256

_MODES = ("none", "auto", "required")
_OBJECTS = 'an object such as {"type": "function", "function": {"name": "..."}}'


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools that the answer may call. mode: "named" if it must call the one there is. max_calls: None: no limit."""

    tools: tuple[Tool, ...]
    mode: Literal["auto", "required", "named"]
    max_calls: int | None

    @property
    def is_forced(self) -> bool:
        return self.mode != "auto"

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.function.name for tool in self.tools)

    @property
    def described(self) -> list[dict[str, Any]]:
        """Return the tools as templates print them."""
        return described_tools(self.tools)


def described_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return tools in the form that templates print: with a description and parameters, which some insist on, and
    without fields for the server."""
    functions = [
        {
            "name": tool.function.name,
            "description": tool.function.description or "",
            "parameters": tool.function.parameters or {"type": "object", "properties": {}},
        }
        for tool in tools
    ]
    return [{"type": "function", "function": function} for function in functions]


def check_tools(tools: Sequence[Tool]) -> None:
    """Raises InvalidRequestError for tools that cannot be called."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"tools has {len(tools)} tools; the limit is {MAX_TOOLS}.", param="tools")
    names: set[str] = set()
    for number, tool in enumerate(tools):
        name = tool.function.name
        if tool.type != "function":
            raise InvalidRequestError(
                f'tools[{number}].type is {quoted(tool.type)}; only "function" is supported.', param="tools"
            )
        if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
            raise InvalidRequestError(
                f"tools[{number}].function.name is {quoted(name)}; it must have 1 to {MAX_NAME_CHARS} characters that "
                "can be printed.",
                param="tools",
            )
        if name in names:
            raise InvalidRequestError(f"tools has two functions called {quoted(name)}. Rename one.", param="tools")
        names.add(name)


def tool_use(fields: ChatRequest) -> ToolUse | None:
    """Return what the request says about tools; None if the answer calls none. Raises InvalidRequestError."""
    tools = fields.tools or []
    check_tools(tools)
    choice: Any = fields.tool_choice
    if choice is None:
        choice = "auto"
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        tools, choice = _allowed(tools, choice.get("allowed_tools"))
    max_calls = 1 if fields.parallel_tool_calls is False else None
    if isinstance(choice, str):
        if choice not in _MODES:
            raise InvalidRequestError(
                f"tool_choice is {quoted(choice)}; it must be one of {', '.join(_MODES)}, or {_OBJECTS}.",
                param="tool_choice",
            )
        if choice == "required" and not tools:
            raise InvalidRequestError('tool_choice is "required", but there are no tools.', param="tool_choice")
        if choice == "none" or not tools:
            return None
        return ToolUse(tuple(tools), "required" if choice == "required" else "auto", max_calls)
    return ToolUse((_named(tools, choice, "tool_choice"),), "named", 1)


def _allowed(tools: Sequence[Tool], allowed: object) -> tuple[list[Tool], str]:
    """Return the tools of OpenAI's `allowed_tools`, and its mode."""
    mode = allowed.get("mode") if isinstance(allowed, dict) else None
    listed = allowed.get("tools") if isinstance(allowed, dict) else None
    if mode not in ("auto", "required") or not isinstance(listed, list):
        raise InvalidRequestError(
            'tool_choice.allowed_tools must have a mode, "auto" or "required", and a list of tools.',
            param="tool_choice",
        )
    named = [_named(tools, one, f"tool_choice.allowed_tools.tools[{number}]") for number, one in enumerate(listed)]
    return named, mode


def _named(tools: Sequence[Tool], choice: object, place: str) -> Tool:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(choice, dict) or choice.get("type") != "function" or not isinstance(name, str):
        raise InvalidRequestError(f"{place} is {quoted(choice)}; it must be {_OBJECTS}.", param="tool_choice")
    for tool in tools:
        if tool.function.name == name:
            return tool
    raise InvalidRequestError(
        f"{place} names the function {quoted(name)}, which is not among the tools.", param="tool_choice"
    )
