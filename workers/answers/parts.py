"""The parts of an answer, in the order of its text, and what turns text into them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of the text that precedes the answer proper."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """More of the text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of a function begins; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the last call's arguments, which are JSON text unless the model broke off or made a mistake."""

    text: str


Part = Reasoning | Content | CallStart | CallArguments


class AnswerParser(Protocol):
    """Reads one answer."""

    def push(self, text: str) -> list[Part]:
        """Read more text; return the parts that are certain."""

    def finish(self) -> list[Part]:
        """End the text; return the parts held back."""


def joined(parts: Iterable[Part]) -> list[Part]:
    """Return the parts with neighbours of one kind as one; calls stay apart."""
    whole: list[Part] = []
    for kind, group in itertools.groupby(parts, type):
        if kind is CallStart:
            whole += group
        else:
            whole.append(kind("".join(_text(part) for part in group)))
    return whole


def _text(part: Part) -> str:
    return part.name if isinstance(part, CallStart) else part.text
