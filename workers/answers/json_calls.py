"""Calls that are written as JSON objects: between marks, after a mark, or with no mark at all.

Qwen, Hermes, SmolLM: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, also with a list in it. Granite and
Phi: a mark, then a list. Llama 3: the object alone, several with semicolons between.

Owns: marks, lists, blanks around calls. Leaves to others: one call (json_call.py).

A call that breaks off before its arguments is content. One that breaks later has everything up to its closing mark as
arguments: a stream cannot take back what it has sent, and a whole answer says the same.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence

from lorafleet.workers.answers.json_call import JsonCall
from lorafleet.workers.answers.marks import Marks
from lorafleet.workers.answers.parts import CallArguments, CallStart, Content, Part
from lorafleet.workers.answers.state_reader import StateReader

_SPACE = re.compile(r"\s*")
_BETWEEN = re.compile(r"[\s,;]*")


class JsonCalls(StateReader):
    """Reads one answer."""

    def __init__(self, *, begin: Sequence[str], end: Sequence[str] = (), tools: Container[str] | None = None) -> None:
        """begin, end: the marks around calls, of which the closing one may be missing. tools: also take objects
        without a mark that begin with the name of one of these."""
        super().__init__(self._search)
        self._begins = Marks((*begin, "{") if tools is not None else begin)
        self._ends = Marks(end)
        self._tools = tools
        self._blanks: list[str] = []  # after content, dropped in front of a call
        self._after_call = False
        self._raw: list[str] = []  # of what may become a call
        self._call: JsonCall | None = None
        self._is_list = False

    def finish(self) -> list[Part]:
        """End the text; return the parts held back."""
        self._is_last = True
        parts = self.push("")
        if self._call is not None and self._call.has_started:
            parts += self._call.finish()
        else:
            self._reject()
            if not self._after_call:
                self._parts += [Content(blank) for blank in self._blanks]
            parts += self._parts
        self._parts = []
        return parts

    def _search(self) -> bool:
        """Read content up to a mark."""
        found = self._begins.find(self._text, self._position)
        if found is None:
            self._content(self._upto(len(self._text) - self._num_held(self._begins)))
            return False
        self._content(self._upto(found.start()))
        if found.group() == "{":
            following = self._text[found.end() : found.end() + 1]
            if following.strip('"'):  # not a name; this only saves time
                self._content(self._upto(found.end()))
            else:
                self._begin_call(self._tools)
        else:
            self._raw.append(self._upto(found.end()))
            self._state = self._open
        return True

    def _open(self) -> bool:
        """Read from a mark to its first call."""
        self._raw.append(self._skip(_SPACE))
        char = self._text[self._position : self._position + 1]
        if char == "{":
            self._begin_call(None)
        elif char == "[" and not self._is_list:
            self._is_list = True
            self._raw.append(self._upto(self._position + 1))
        elif char:
            self._begin_other()
        return bool(char)

    def _begin_other(self) -> None:
        """Begin with what is neither an object nor a list."""
        self._reject()

    def _begin_call(self, tools: Container[str] | None) -> None:
        self._call = JsonCall(tools)
        self._state = self._in_call

    def _in_call(self) -> bool:
        call = self._call
        assert call is not None
        parts, self._position = call.push(self._text, self._position)
        self._add_call(parts)
        if call.is_done:
            self._call, self._state = None, self._between
        elif call.is_broken:
            if call.has_started:
                self._add_call(call.finish())
                self._state = self._broken
            else:
                self._reject()
        return call.is_done or call.is_broken

    def _between(self) -> bool:
        """Read from a call to the next one, or to the closing mark."""
        self._skip(_BETWEEN)
        if self._position == len(self._text):
            return False
        end = self._ends.at(self._text, self._position)
        if end is not None:
            self._position = end.end()
        elif self._text[self._position] == "]" and self._is_list:
            self._position += 1
            self._is_list = False
            return True
        elif self._text[self._position] == "{" and self._tools is None:
            self._begin_call(None)
            return True
        elif self._num_held(self._ends) == len(self._text) - self._position:
            return False
        self._is_list = False
        self._state = self._search
        return True

    def _broken(self) -> bool:
        """Read the rest of arguments that are not JSON."""
        end = self._ends.find(self._text, self._position)
        upto = len(self._text) - self._num_held(self._ends) if end is None else end.start()
        if upto > self._position:
            self._parts.append(CallArguments(self._upto(upto)))
        if end is None:
            return False
        self._position = end.end()
        self._call, self._is_list, self._state = None, False, self._search
        return True

    def _reject(self) -> None:
        """Make what looked like a call content."""
        raw = self._raw + ([] if self._call is None else self._call.raw)
        self._raw, self._call, self._is_list, self._state = [], None, False, self._search
        self._content("".join(raw))

    def _add_call(self, parts: list[Part]) -> None:
        if any(isinstance(part, CallStart) for part in parts):
            self._raw, self._blanks, self._after_call = [], [], True
        self._parts += parts

    def _content(self, text: str) -> None:
        if self._after_call:
            text = text.lstrip()
        if not text:
            return
        self._after_call = False
        shown = text.rstrip()
        if shown:
            self._parts.append(Content("".join([*self._blanks, shown])))
            self._blanks = []
        self._blanks.append(text[len(shown) :])

    def _upto(self, end: int) -> str:
        text, self._position = self._text[self._position : end], end
        return text

    def _skip(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._position)
        assert found is not None
        return self._upto(found.end())

    def _num_held(self, marks: Marks) -> int:
        """Return the length of the text's end that may be the beginning of a mark."""
        return 0 if self._is_last else marks.num_begun(self._text, self._position)
