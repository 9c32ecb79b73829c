"""Reads a text whole, by characters, and in every split into two and three pieces: the parts must be the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

from lorafleet.workers.answers.parts import (
    AnswerParser,
    CallArguments,
    CallStart,
    Content,
    Part,
    Reasoning,
    joined,
)

Make = Callable[[], AnswerParser]


def parts_of(make: Make, pieces: Iterable[str]) -> list[Part]:
    """The parts of a text in pieces."""
    parser = make()
    parts = [part for piece in pieces for part in parser.push(piece)]
    return joined(parts + parser.finish())


def told(make: Make, text: str) -> list[tuple[str, ...]]:
    """A text's parts in few words, the same however it is split: content, reasoning, or a call and its arguments."""
    whole = parts_of(make, [text])
    for pieces in splits(text):
        assert parts_of(make, pieces) == whole, pieces
    return short(whole)


def splits(text: str) -> Iterator[list[str]]:
    yield list(text)
    places = range(len(text) + 1)
    yield from ([text[:place], text[place:]] for place in places)
    for first, second in itertools.combinations(places, 2):
        yield [text[:first], text[first:second], text[second:]]


def short(parts: Iterable[Part]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for part in parts:
        if isinstance(part, Content):
            found.append(("content", part.text))
        elif isinstance(part, Reasoning):
            found.append(("reasoning", part.text))
        elif isinstance(part, CallStart):
            found.append(("call", part.name))
        elif isinstance(part, CallArguments):
            found[-1] += (part.text,)
    return found
