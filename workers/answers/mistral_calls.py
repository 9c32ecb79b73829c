"""Mistral's calls: ``[TOOL_CALLS][{"name": ..., "arguments": {...}}]`` and, of newer models, ``[TOOL_CALLS]name{...}``.

Owns: names in front of arguments. Leaves to others: the older form (json_calls.py).
"""

from __future__ import annotations

import re
from typing import Final

from lorafleet.workers.answers.json_call import MAX_NAME_CHARS
from lorafleet.workers.answers.json_calls import JsonCalls
from lorafleet.workers.answers.json_object import Event, JsonObject
from lorafleet.workers.answers.parts import CallArguments, CallStart

BEGIN: Final = "[TOOL_CALLS]"
CALL_ID: Final = "[CALL_ID]"
ARGUMENTS: Final = "[ARGS]"
_MAX_HEAD_CHARS = MAX_NAME_CHARS + 64
_HEAD = re.compile(rf"([\w.:/-]{{1,{MAX_NAME_CHARS}}})({re.escape(CALL_ID)}\w*)?({re.escape(ARGUMENTS)})?\s*")


class MistralCalls(JsonCalls):
    """Reads one answer."""

    def __init__(self) -> None:
        super().__init__(begin=(BEGIN,))
        self._head = ""  # from the mark to the arguments
        self._object = JsonObject()

    def _begin_other(self) -> None:
        self._head, self._state = "", self._in_head

    def _in_head(self) -> bool:
        """Read the name, and what else precedes the arguments."""
        room = _MAX_HEAD_CHARS - len(self._head)
        brace = self._text.find("{", self._position, self._position + room)
        end = min(len(self._text), self._position + room) if brace < 0 else brace
        piece = self._upto(end)
        self._head += piece
        self._raw.append(piece)
        if brace < 0 and len(self._head) < _MAX_HEAD_CHARS:
            return False
        found = _HEAD.fullmatch(self._head)
        if brace < 0 or found is None:
            self._reject()
            return True
        self._add_call([CallStart(found[1])])
        self._object, self._state = JsonObject(), self._in_arguments
        return True

    def _in_arguments(self) -> bool:
        start = self._position
        event: Event | None = None
        while event not in (Event.DONE, Event.BROKEN) and (self._position < len(self._text) or self._object.has_event):
            read, self._position = self._object.read(self._text, self._position)
            event = None if read is None else read.event
        if self._position > start:
            self._parts.append(CallArguments(self._text[start : self._position]))
        if event is Event.DONE:
            self._state = self._between
        elif event is Event.BROKEN:
            self._state = self._broken
        return event in (Event.DONE, Event.BROKEN)
