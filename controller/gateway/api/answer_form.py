"""How the text of a chat answer becomes a message: which parsers read it.

Owns: what the request, the server's flags and the model say about it together. Leaves to others: the parsers
(workers/answers), messages as JSON (chat_message.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lorafleet.controller.gateway.api.schema import ChatRequest
from lorafleet.controller.gateway.api.tools import ToolUse, tool_use
from lorafleet.controller.gateway.options import GatewayOptions
from lorafleet.workers.answers.call_syntax import CallSyntax
from lorafleet.workers.answers.message import MessageReader
from lorafleet.workers.answers.reasoning import REASONING_FORMATS, ReasoningFormat, ReasoningParser
from lorafleet.workers.answers.tool_formats import PLAIN, ToolFormat
from lorafleet.workers.errors import InvalidRequestError, quoted
from lorafleet.workers.grammars.answer_grammar import CallRules, answer_grammar
from lorafleet.workers.text.model_text import ModelText

REASONING_EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_TAIL_TOKENS = 32  # of a prompt, which may end with the mark of reasoning and blanks
_ID_CHARS, _SHORT_ID_CHARS = 24, 9  # of a call's id


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForm:
    """The form of one request's answers. reasoning: None if the model's is part of the content."""

    tools: ToolUse | None
    calls: ToolFormat
    reasoning: ReasoningFormat | None
    shows_reasoning: bool
    has_short_ids: bool  # of calls

    @property
    def is_plain(self) -> bool:
        """Return whether all of the text is the message's content."""
        return self.tools is None and self.reasoning is None

    @property
    def marks(self) -> tuple[str, ...]:
        """Return the texts that the parsers look for, which may be special tokens."""
        of_calls = (*self.calls.begin, *self.calls.end) if self.tools is not None else ()
        return of_calls + (() if self.reasoning is None else (*self.reasoning.begin, *self.reasoning.end))

    def is_open(self, text: ModelText, prompt: Sequence[int]) -> bool | None:
        """Return whether a prompt has begun the reasoning (see `ReasoningFormat.is_open`)."""
        if self.reasoning is None:
            return None
        return self.reasoning.is_open(text.tokenizer.decode(prompt[-_TAIL_TOKENS:], skip_special_tokens=False))

    def reader(self, is_open: bool | None) -> MessageReader:
        """Return the reader of one answer."""
        tools, reasoning = self.tools, None
        if self.reasoning is not None:
            also_ends = self.calls.begin if tools is not None else ()
            reasoning = ReasoningParser(self.reasoning, is_open=is_open, also_ends=also_ends)
        return MessageReader(
            reasoning=reasoning,
            calls=None if tools is None else self.calls.parser(tools.names),
            shows_reasoning=self.shows_reasoning,
            max_calls=None if tools is None else tools.max_calls,
        )

    @property
    def is_forced(self) -> bool:
        """Return whether the answer must call a tool."""
        return self.tools is not None and self.tools.is_forced

    def has_grammar(self, content: str) -> bool:
        """Return whether the answer must follow another grammar than that of its content, which may be empty."""
        return self.is_forced or (bool(content) and not self.is_plain)

    def grammar(self, content: str, text: ModelText, is_open: bool | None) -> str:
        """Return the grammar that the answer must follow. content: that of its content, or empty."""
        return answer_grammar(
            content="" if self.is_forced else content,
            calls=None if self.tools is None else self._call_rules(self.tools),
            reasoning=self.reasoning,
            is_open=is_open,
            token_of=text.tokenizer.added_id,
        )

    def _call_rules(self, tools: ToolUse) -> CallRules | None:
        syntax = self.calls.syntax
        if not isinstance(syntax, CallSyntax):
            return None
        functions = [tool.function for tool in tools.tools]
        return CallRules(
            functions=[(function.name, function.parameters, function.strict is True) for function in functions],
            syntax=syntax,
            marks=(*self.calls.begin, *self.calls.end),
            takes_several=tools.max_calls is None,
        )

    def new_call_id(self) -> str:
        """Return a new id for a call."""
        random = secrets.token_hex(_ID_CHARS)
        return random[:_SHORT_ID_CHARS] if self.has_short_ids else f"call_{random[:_ID_CHARS]}"


def answer_form(fields: ChatRequest, text: ModelText, options: GatewayOptions) -> AnswerForm:
    """Return the form of a request's answers. Raises InvalidRequestError for its fields about tools."""
    tools = tool_use(fields)
    if tools is not None and tools.mode == "auto" and not options.enable_auto_tool_choice:
        raise InvalidRequestError(
            'tool_choice is "auto", which this server has turned off (--no-enable-auto-tool-choice). Give "none", '
            '"required" or the name of a function.',
            param="tool_choice",
        )
    calls = text.tool_format(options.tool_call_parser)
    if tools is not None and tools.is_forced and not isinstance(calls.syntax, CallSyntax):
        calls = PLAIN
    reasoning = text.profile.reasoning_parser or options.reasoning_parser
    return AnswerForm(
        tools=tools,
        calls=calls,
        reasoning=None if reasoning is None else REASONING_FORMATS[reasoning],
        shows_reasoning=fields.include_reasoning is not False,
        has_short_ids=text.tool_form.takes_short_ids,
    )


def reasoning_kwargs(effort: str | None) -> Mapping[str, str | bool]:
    """Return the template's variables for `reasoning_effort`. Raises InvalidRequestError for an unknown one."""
    if effort is None:
        return {}
    if effort not in REASONING_EFFORTS:
        raise InvalidRequestError(
            f"reasoning_effort is {quoted(effort)}; it must be one of {', '.join(REASONING_EFFORTS)}.",
            param="reasoning_effort",
        )
    return {"reasoning_effort": effort} | ({"enable_thinking": False} if effort == "none" else {})
