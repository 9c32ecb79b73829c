"""A chat message as OpenAI's JSON, whole or as a stream's deltas: content, reasoning, calls.

Owns: the shapes. Leaves to others: the parts of an answer (workers/answers), which parsers read it (answer_form.py),
chunks (chat.py).
"""

from __future__ import annotations

from typing import Any, Literal

from lorafleet.controller.gateway.api.answer_form import AnswerForm
from lorafleet.workers.answers.parts import CallArguments, CallStart, Content, Part, Reasoning

FinishReason = Literal["stop", "length", "tool_calls"]


class ChatMessage:
    """The message of one choice. Reasoning has both of its names: `reasoning` and `reasoning_content`."""

    def __init__(self, form: AnswerForm, is_open: bool | None) -> None:
        """is_open: whether the prompt has begun the reasoning."""
        self._form = form
        self._reader = form.reader(is_open)
        self._num_calls = 0

    def whole(self, text: str) -> dict[str, Any]:
        """Return the message of a whole text.

        Content is null beside calls, and empty beside calls that were forced, as vLLM has it.
        """
        texts: dict[type[Part], list[str]] = {Content: [], Reasoning: []}
        calls: list[dict[str, Any]] = []
        for part in self._reader.push(text, is_last=True):
            if isinstance(part, CallStart):
                calls.append(self._call(part))
            elif isinstance(part, CallArguments):
                calls[-1]["function"]["arguments"] += part.text
            else:
                texts[type(part)].append(part.text)
        content, reasoning = "".join(texts[Content]), "".join(texts[Reasoning]) or None
        has_content = content or self._form.is_forced or not (calls or reasoning)
        message = {"content": content if has_content else None, "refusal": None}
        message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        return message | ({"tool_calls": calls} if calls else {})

    def deltas(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        """Return the deltas for more text. is_last: nothing follows."""
        return [self._delta(part) for part in self._reader.push(text, is_last=is_last)]

    def finish_reason(self, reason: Literal["stop", "length"] | None) -> FinishReason | None:
        """Return the reason as OpenAI tells it: calls that the model chose to make are one."""
        tools = self._form.tools
        if reason == "stop" and self._num_calls and tools is not None and tools.mode != "named":
            return "tool_calls"
        return reason

    def _call(self, part: CallStart) -> dict[str, Any]:
        self._num_calls += 1
        call_id = self._form.new_call_id()
        return {"id": call_id, "type": "function", "function": {"name": part.name, "arguments": ""}}

    def _delta(self, part: Part) -> dict[str, Any]:
        if isinstance(part, Content):
            return {"content": part.text}
        if isinstance(part, Reasoning):
            return {"reasoning": part.text, "reasoning_content": part.text}
        if isinstance(part, CallStart):
            call = self._call(part)
            return {"tool_calls": [{"index": self._num_calls - 1} | call]}
        return {"tool_calls": [{"index": self._num_calls - 1, "function": {"arguments": part.text}}]}
