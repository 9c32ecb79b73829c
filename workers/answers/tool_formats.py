"""The formats of tool calls, by the names that `--tool-call-parser` takes.

Owns: their table, and recognising a chat template's. Leaves to others: reading calls (json_calls.py and its
neighbours).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from lorafleet.workers.answers.call_syntax import CallSyntax, PythonicSyntax
from lorafleet.workers.answers.json_calls import JsonCalls
from lorafleet.workers.answers.mistral_calls import BEGIN, MistralCalls
from lorafleet.workers.answers.parts import AnswerParser
from lorafleet.workers.answers.pythonic_calls import PythonicCalls


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """A format.

    parser: makes the reader of one answer, for tools of these names. begin, end: the marks around calls, which a
    tokenizer may have as special tokens. syntax: how calls are written.
    """

    parser: Callable[[Collection[str]], AnswerParser]
    syntax: CallSyntax | PythonicSyntax
    begin: tuple[str, ...] = ()
    end: tuple[str, ...] = ()


def _json(
    begin: tuple[str, ...], syntax: CallSyntax, end: tuple[str, ...] = (), *, is_bare: bool = False
) -> ToolFormat:
    def parser(tools: Collection[str]) -> AnswerParser:
        return JsonCalls(begin=begin, end=end, tools=tools if is_bare else None)

    return ToolFormat(parser=parser, syntax=syntax, begin=begin, end=end)


def _in_list(begin: str, end: str, arguments: str = "arguments") -> CallSyntax:
    return CallSyntax(begin=begin, between=", ", end=end, arguments=arguments)


HERMES: Final = _json(
    ("<tool_call>",), CallSyntax(before="<tool_call>\n", after="\n</tool_call>", between="\n"), ("</tool_call>",)
)
PLAIN: Final = _json(("[",), _in_list("[", "]", "parameters"), ("]",))
"""A list without marks, which only a grammar makes sure of."""
_LLAMA = _json(("<|python_tag|>",), CallSyntax(between="; ", arguments="parameters"), is_bare=True)
_PYTHONIC = ToolFormat(parser=PythonicCalls, syntax=PythonicSyntax(), begin=("<|python_tag|>",))
_MISTRAL = ToolFormat(parser=lambda tools: MistralCalls(), syntax=_in_list(f"{BEGIN}[", "]"), begin=(BEGIN,))
_GRANITE = _json(("<|tool_call|>", "<tool_call>", "<function_call>"), _in_list("<|tool_call|>[", "]"))
_GRANITE_20B = _json(("<function_call>",), CallSyntax(before="<function_call> ", between=" "))
_PHI = _json(("<|tool_call|>", "functools"), _in_list("<|tool_call|>[", "]<|/tool_call|>"), ("<|/tool_call|>",))
TOOL_FORMATS: Final = {
    "gemma": _PYTHONIC,
    "granite": _GRANITE,
    "granite-20b-fc": _GRANITE_20B,
    "granite4": HERMES,
    "hermes": HERMES,
    "llama3_json": _LLAMA,
    "llama4_json": _LLAMA,
    "llama4_pythonic": _PYTHONIC,
    "mistral": _MISTRAL,
    "phi4_mini_json": _PHI,
    "pythonic": _PYTHONIC,
    "qwen": HERMES,
    "smollm": HERMES,
}


# The first whose sign a template has: texts of published templates.
_SIGNS = (
    ("mistral", (BEGIN,)),
    ("phi4_mini_json", ("<|/tool_call|>", "<|/tool|>", "functools[")),
    ("granite-20b-fc", ("<function_call>",)),
    ("granite", ("<|tool_call|>", "<|start_of_role|>available_tools")),
    ("hermes", ("<tool_call>",)),
    ("pythonic", ("[func_name1(", "<|python_start|>")),
    ("llama3_json", ("<|python_tag|>", '"parameters": dictionary of argument name')),
)


def recognised(template: str) -> str | None:
    """Return the name of the format that a chat template asks for; None if it asks for none of these."""
    return next((name for name, signs in _SIGNS if any(sign in template for sign in signs)), None)
