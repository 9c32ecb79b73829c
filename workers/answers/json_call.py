"""One call that is written as a JSON object: ``{"name": "get_weather", "arguments": {"city": "Paris"}}``.

Owns: the names of its members, and when a call is certain. Leaves to others: JSON (json_object.py), what surrounds the
object (json_calls.py).
"""

from __future__ import annotations

import json
from collections.abc import Container
from typing import Final

from lorafleet.workers.answers.json_object import Event, JsonObject
from lorafleet.workers.answers.parts import CallArguments, CallStart, Part

MAX_NAME_CHARS: Final = 256
_MAX_HEAD_CHARS = 1024  # before the arguments of an unmarked call
_ARGUMENTS = frozenset({"arguments", "parameters"})


class JsonCall:
    """Reads from the object's opening brace. The call starts once its name is known and its arguments begin.

    raw: what has been read, until the call starts. After `is_done` or `is_broken` nothing more is read.
    """

    def __init__(self, tools: Container[str] | None = None) -> None:
        """tools: for a call without a mark around it, which could be any JSON. Its object must begin with the name of
        one of them, after at most a type."""
        self.raw: list[str] = []
        self.has_started = self.is_done = self.is_broken = False
        self._tools = tools
        self._num_head_chars = 0
        self._object = JsonObject()
        self._key = ""
        self._name: str | None = None
        self._name_text: list[str] = []
        self._held: list[str] = []  # arguments that came before the name, or that wait for their end
        self._waits = False  # for their end, since they are no object
        self._has_arguments = False

    def push(self, text: str, position: int) -> tuple[list[Part], int]:
        """Read what belongs to the call. Return its parts and the position after it."""
        parts: list[Part] = []
        while not (self.is_done or self.is_broken) and (position < len(text) or self._object.has_event):
            read, end = self._read(text, position)
            if not self.has_started:
                self.raw.append(text[position:end])
            position = end
            if read is not None:
                self._take(*read, parts)
        return parts, position

    def finish(self) -> list[Part]:
        """End the text within the call, which has started; return the rest of its arguments."""
        held, self._held = "".join(self._held), []
        return [CallArguments(held)] if held else []

    def _read(self, text: str, position: int) -> tuple[tuple[Event, str] | None, int]:
        if self._tools is None or self.has_started:
            return self._object.read(text, position)
        room = _MAX_HEAD_CHARS - self._num_head_chars
        if not room and not self._object.has_event:
            return (Event.BROKEN, ""), position
        read, num_chars = self._object.read(text[position : position + room], 0)
        self._num_head_chars += num_chars
        return read, position + num_chars

    def _take(self, event: Event, text: str, parts: list[Part]) -> None:
        if event is Event.KEY:
            self._key = text
            if self._tools is not None and self._name is None and text not in ("name", "type"):
                self.is_broken = True
        elif event is Event.TEXT:
            if self._key == "name" and self._name is None:
                self._name_text.append(text)
            elif self._key in _ARGUMENTS and not self._has_arguments:
                self._add_arguments(text, parts)
        elif event is Event.END:
            if self._key == "name" and self._name is None:
                self._end_name(parts)
            elif self._key in _ARGUMENTS:
                self._end_arguments(parts)
        elif event is Event.DONE and (self.has_started or (self._name is not None and self._tools is None)):
            self.is_done = True
            if not self.has_started:
                self._start(parts)
                parts.append(CallArguments("{}"))
        else:
            self.is_broken = True

    def _end_name(self, parts: list[Part]) -> None:
        name = _decoded("".join(self._name_text))
        if not name or len(name) > MAX_NAME_CHARS or (self._tools is not None and name not in self._tools):
            self.is_broken = True
            return
        self._name = name
        if self._held or self._has_arguments:
            self._start(parts)
            self._release(parts)

    def _add_arguments(self, text: str, parts: list[Part]) -> None:
        if not self._held and not self.has_started:
            self._waits = not text.startswith("{")
            if self._name is not None:
                self._start(parts)
        if self._waits or self._name is None:
            self._held.append(text)
        else:
            parts.append(CallArguments(text))

    def _end_arguments(self, parts: list[Part]) -> None:
        self._has_arguments = True
        if self._waits:
            text = "".join(self._held)
            self._held = ["{}" if text == "null" else _decoded(text) or text]
            self._waits = False
        if self._name is not None:
            self._release(parts)

    def _release(self, parts: list[Part]) -> None:
        if self._held and not self._waits:
            parts.append(CallArguments("".join(self._held)))
            self._held = []

    def _start(self, parts: list[Part]) -> None:
        assert self._name is not None
        self.has_started = True
        self.raw = []
        parts.append(CallStart(self._name))


def _decoded(text: str) -> str | None:
    """Return the text of a JSON string; None if it is none, or not Unicode."""
    try:
        value = json.loads(text, strict=False)
        return value if isinstance(value, str) and value.encode() is not None else None
    except ValueError:
        return None
