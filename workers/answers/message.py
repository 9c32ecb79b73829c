"""The reader of one answer to a chat: reasoning first, then content and calls."""

from __future__ import annotations

from lorafleet.workers.answers.parts import AnswerParser, CallArguments, CallStart, Content, Part, Reasoning, joined
from lorafleet.workers.answers.reasoning import ReasoningParser


class MessageReader:
    """Splits an answer's text into its parts; neighbours of one kind are one part."""

    def __init__(
        self,
        *,
        reasoning: ReasoningParser | None = None,
        calls: AnswerParser | None = None,
        shows_reasoning: bool = True,
        max_calls: int | None = None,
    ) -> None:
        """calls: reads what is not reasoning. max_calls: further ones are left out; None: any number."""
        self._reasoning = reasoning
        self._calls = calls
        self._shows_reasoning = shows_reasoning
        self._max_calls = max_calls
        self.num_calls = 0

    def push(self, text: str, *, is_last: bool = False) -> list[Part]:
        """Read more text; return the parts that are certain. is_last: nothing follows."""
        parts: list[Part] = [Content(text)] if text else []
        if self._reasoning is not None:
            parts = self._reasoning.push(text)
            if is_last:
                parts += self._reasoning.finish()
        if self._calls is not None:
            parts = self._read_calls(self._calls, parts, is_last)
        return joined([part for part in parts if self._is_shown(part)])

    def _read_calls(self, calls: AnswerParser, parts: list[Part], is_last: bool) -> list[Part]:
        read: list[Part] = []
        for part in parts:
            read += calls.push(part.text) if isinstance(part, Content) else [part]
        return read + calls.finish() if is_last else read

    def _is_shown(self, part: Part) -> bool:
        if isinstance(part, Reasoning):
            return self._shows_reasoning
        if isinstance(part, CallStart):
            self.num_calls += 1
        is_of_call = isinstance(part, CallStart | CallArguments)
        return not is_of_call or self._max_calls is None or self.num_calls <= self._max_calls
