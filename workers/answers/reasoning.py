"""Reasoning in front of an answer: ``<think>...</think>The answer``.

Owns: the marks, where reasoning begins and ends. Leaves to others: the answer (the calls' parsers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from lorafleet.workers.answers.marks import Marks
from lorafleet.workers.answers.parts import Content, Part, Reasoning


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model family marks its reasoning.

    is_implied: text without the opening mark is reasoning too, since the family's templates write that mark.
    """

    begin: tuple[str, ...]
    end: tuple[str, ...]
    is_implied: bool = False

    def is_open(self, prompt: str) -> bool | None:
        """Return whether a prompt ends in reasoning; None if it says nothing about it. prompt: or its last part."""
        prompt = prompt.rstrip()
        if prompt.endswith(self.begin):
            return True
        return False if prompt.endswith(self.end) else None


_THINK = ReasoningFormat(("<think>",), ("</think>",))
_DEEPSEEK_R1 = ReasoningFormat(("<think>",), ("</think>",), is_implied=True)
_GRANITE = ReasoningFormat(
    ("Here is my thought process:", "Here's my thought process:"), ("Here is my response:", "Here's my response:")
)

REASONING_FORMATS: Final = {
    "deepseek_r1": _DEEPSEEK_R1,
    "granite": _GRANITE,
    "mistral": ReasoningFormat(("[THINK]",), ("[/THINK]",)),
    "qwen3": _THINK,
    "smollm3": _THINK,
    "think": _THINK,
}
"""By the names that `--reasoning-parser` takes."""


class ReasoningParser:
    """Splits one answer into reasoning and content, without the blanks around the marks."""

    def __init__(
        self, reasoning: ReasoningFormat, *, is_open: bool | None = None, also_ends: Sequence[str] = ()
    ) -> None:
        """is_open: see `ReasoningFormat.is_open`. also_ends: marks that begin a call, which ends reasoning too, since
        models forget to."""
        self._begin = reasoning.begin
        self._closing = reasoning.end
        self._ends = Marks((*reasoning.end, *also_ends))
        self._is_implied = reasoning.is_implied if is_open is None else is_open
        self._text = ""  # not yet read, only as much as could be a part of a mark
        self._is_last = False
        self._blanks: list[str] = []  # dropped in front of a mark
        self._is_start = True  # nothing of the reasoning, or of the answer after it, has come
        self._parts: list[Part] = []
        self._state: Callable[[], bool] = self._answer if is_open is False else self._first

    def push(self, text: str) -> list[Part]:
        """Read more text; return the parts that are certain."""
        self._text += text
        while self._text and self._state():
            pass
        parts, self._parts = self._parts, []
        return parts

    def finish(self) -> list[Part]:
        """End the text; return the parts held back."""
        self._is_last = True
        return self.push("")

    def _first(self) -> bool:
        """Read the opening mark, or what says that there is none."""
        text = self._text.lstrip()
        blank, self._text = self._text[: len(self._text) - len(text)], text
        self._blanks.append(blank)
        begin = next((mark for mark in self._begin if text.startswith(mark)), None)
        if begin is not None:
            self._text, self._state = text[len(begin) :], self._reason
        elif not self._is_last and any(mark.startswith(text) for mark in self._begin):
            return False
        elif self._is_implied:
            self._state = self._reason
        else:
            self._text, self._is_start, self._state = "".join(self._blanks) + text, False, self._answer
        self._blanks = []
        return True

    def _reason(self) -> bool:
        """Read reasoning up to its end."""
        found = self._ends.find(self._text)
        num_held = 0 if self._is_last else self._ends.num_begun(self._text)
        upto = len(self._text) - num_held if found is None else found.start()
        text, self._text = self._text[:upto], self._text[upto:]
        if self._is_start:
            text = text.lstrip()
        shown = text.rstrip()
        if shown:
            self._parts.append(Reasoning("".join([*self._blanks, shown])))
            self._is_start, self._blanks = False, []
        self._blanks.append(text[len(shown) :])
        if found is None:
            return False
        if found.group() in self._closing:
            self._text = self._text[len(found.group()) :]
        self._is_start, self._state = True, self._answer
        return True

    def _answer(self) -> bool:
        """Read the answer."""
        text, self._text = self._text, ""
        if self._is_start:
            text = text.lstrip()
        if text:
            self._is_start = False
            self._parts.append(Content(text))
        return False
