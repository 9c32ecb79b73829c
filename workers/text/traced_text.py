"""Text that knows which of its characters a request chose, through everything a template does with it.

A chat template mixes its own literals with a request's text. Only the literals may become control tokens
(control_tokens.py), so the sandbox has to tell the two apart in the prompt. Where an operation mixes them, this module
says whose each character is; where it cannot say, all of the result counts as the request's.

Owns: the text and its operations. Leaves to others: which operations a template may use (template_sandbox.py).
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, Final, SupportsIndex

Spans = tuple[tuple[int, int], ...]
"""Ranges of characters, ascending, none empty, none touching the next."""

MAX_PIECES: Final = 1 << 16
"""Parts of a text, and replacements in it, that are traced one by one; of more, all counts as content."""

_NONCE = secrets.token_hex(8)
_BEGIN, _END = f"x{_NONCE}b", f"x{_NONCE}e"  # words, which JSON, repr and formats leave as they are
_MARKS: Final = re.compile(f"({_BEGIN}|{_END})")


class TracedText(str):
    """A string of which some characters are content: chosen by a request. Every method that returns text traces it."""

    __slots__ = ("_content",)
    _content: Spans | None  # None: all

    def __new__(cls, text: str, content: Spans | None = None) -> TracedText:
        """content: None for all of the text."""
        self = super().__new__(cls, text)
        self._content = content
        return self

    def __str__(self) -> str:
        return self

    def __getitem__(self, key: SupportsIndex | slice) -> TracedText:
        text = super().__getitem__(key)
        if not isinstance(key, slice):
            position = range(len(self))[key]
            return _letter(text, self._content is None or bool(self._clipped(position, position + 1)))
        if not self._content:
            return TracedText(text, self._content)
        start, stop, step = key.indices(len(self))
        return TracedText(text, self._clipped(start, stop) if step == 1 else None)

    def __iter__(self) -> Iterator[str]:
        position = 0
        for begin, end in content_of(self):
            yield from (_letter(letter, False) for letter in super().__getitem__(slice(position, begin)))
            yield from (_letter(letter, True) for letter in super().__getitem__(slice(begin, end)))
            position = end
        yield from (_letter(letter, False) for letter in super().__getitem__(slice(position, None)))

    def _clipped(self, start: int, stop: int) -> Spans:
        """Return the content from start to stop, counted from start."""
        content = self._content or ()
        clipped: list[tuple[int, int]] = []
        for number in range(bisect_right(content, start, key=lambda span: span[1]), len(content)):
            begin, end = content[number]
            if begin >= stop:
                break
            clipped.append((max(begin, start) - start, min(end, stop) - start))
        return tuple(clipped)

    def __add__(self, other: str) -> str:
        return join_texts((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return join_texts((other, self))

    def __mul__(self, times: SupportsIndex) -> str:
        return join_texts([self] * times.__index__())

    __rmul__ = __mul__

    def lstrip(self, chars: str | None = None) -> TracedText:
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None) -> TracedText:
        return self[: len(super().rstrip(chars))]

    def strip(self, chars: str | None = None) -> TracedText:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str, /) -> TracedText:
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str, /) -> TracedText:
        return self[: len(super().removesuffix(suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(super().split(sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(super().rsplit(sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        whole = self._located(super().splitlines(keepends=True), 0)
        return [line[: len(shown)] for line, shown in zip(whole, super().splitlines(keepends), strict=True)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        return self._in_three(super().partition(sep))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        return self._in_three(super().rpartition(sep))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old or self.count(old) > MAX_PIECES:
            return TracedText(super().replace(old, new, count))
        return TracedText(new, content_of(new)).join(self.split(old, count))

    def join(self, parts: Iterable[str], /) -> str:
        separated = [text for part in parts for text in (self, part)]
        return join_texts(islice(separated, 1, None))

    def lower(self) -> TracedText:
        return self._like(super().lower())

    def upper(self) -> TracedText:
        return self._like(super().upper())

    def capitalize(self) -> TracedText:
        return self._like(super().capitalize())

    def title(self) -> TracedText:
        return self._like(super().title())

    def _like(self, text: str) -> TracedText:
        """Return a text with this one's content, character for character."""
        return TracedText(text, self._content if len(text) == len(self) else None)

    def _located(self, pieces: Sequence[str], num_between: int) -> list[str]:
        """Return parts of this text that follow each other. num_between: characters that are left out between them."""
        if not self._content or len(pieces) > MAX_PIECES:
            content = None if self._content else self._content
            return [TracedText(piece, content) for piece in pieces]
        parts: list[str] = []
        position = 0
        for piece in pieces:
            position = self.find(piece, position)
            parts.append(self[position : position + len(piece)])
            position += len(piece) + num_between
        return parts

    def _in_three(self, parts: tuple[str, str, str]) -> tuple[str, str, str]:
        first, second = len(parts[0]), len(parts[0]) + len(parts[1])
        return self[:first], self[first:second], self[second:]


@lru_cache(maxsize=1 << 12)
def _letter(letter: str, is_content: bool) -> TracedText:
    """Return a text of one character. A list of a text's characters refers to few of them many times."""
    return TracedText(letter, None if is_content else ())


def content_of(text: str) -> Spans:
    """Return the characters of a text that a request chose."""
    if not isinstance(text, TracedText):
        return ()
    return text._content if text._content is not None else ((0, len(text)),) if text else ()


def has_content(value: object) -> bool:
    """Return whether some text in a value, also deep in lists and dictionaries, is a request's."""
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, TracedText):
            if content_of(item):
                return True
        elif isinstance(item, Mapping):
            rest += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            rest += item
    return False


def join_texts(texts: Iterable[str]) -> str:
    """Join texts without a separator."""
    parts = list(texts)
    joined = "".join(parts)
    if not any(isinstance(part, TracedText) for part in parts):
        return joined
    spans: list[tuple[int, int]] = []
    position = 0
    for part in parts:
        for begin, end in content_of(part):
            if spans and spans[-1][1] == position + begin:
                begin = spans.pop()[0] - position
            spans.append((position + begin, position + end))
        position += len(part)
    return TracedText(joined, tuple(spans))


def text_of(value: object) -> str:
    """Return a value as text, as `str` does. That of an object which may hold any text is all content."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | dict):
        return written(str, value)
    return str(value) if value is None or isinstance(value, int | float) else TracedText(str(value))


def written(write: Callable[..., str], *values: object, **named: object) -> str:
    """Return what a function writes of values.

    It may quote or escape them; if it changes them more, such as cutting them to a width, all of the result is content.
    """
    text = write(*values, **named)
    parts: list[str] = []
    depth = 0
    marked = write(*map(_marked, values), **{name: _marked(value) for name, value in named.items()})
    for number, piece in enumerate(_MARKS.split(marked)):
        if number % 2:
            depth += 1 if piece == _BEGIN else -1
        else:
            parts.append(TracedText(piece) if depth else piece)
    traced = join_texts(parts)
    return traced if traced == text else TracedText(text)


def _marked(value: Any) -> Any:
    """Return a copy of a value with marks around the content of its texts."""
    if isinstance(value, TracedText):
        pieces, position = [], 0
        for begin, end in content_of(value):
            pieces += [str.__getitem__(value, slice(position, begin)), _BEGIN]
            pieces += [str.__getitem__(value, slice(begin, end)), _END]
            position = end
        return "".join([*pieces, str.__getitem__(value, slice(position, None))])
    if isinstance(value, dict):
        return {_marked(key): _marked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_marked, value)) if type(value) in (list, tuple) else tuple(map(_marked, value))
    return value
