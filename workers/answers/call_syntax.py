"""How calls are written, for prompts that show it and grammars that enforce it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class WrittenCall(NamedTuple):
    """A call of a function."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSyntax:
    """Calls as JSON objects of a name and arguments.

    A list of calls is `begin`, the calls with `between`, `end`; a call is `before`, its object, `after`. arguments: the
    object's key for them.
    """

    begin: str = ""
    end: str = ""
    before: str = ""
    after: str = ""
    between: str = ""
    arguments: str = "arguments"

    def text(self, calls: Iterable[WrittenCall]) -> str:
        """Return some calls as text."""
        objects = (json.dumps({"name": name, self.arguments: values}, ensure_ascii=False) for name, values in calls)
        return self.begin + self.between.join(f"{self.before}{one}{self.after}" for one in objects) + self.end


class PythonicSyntax:
    """Calls as Python's, which no grammar enforces."""

    def text(self, calls: Iterable[WrittenCall]) -> str:
        """Return some calls as text."""
        return f"[{', '.join(map(self._call, calls))}]"

    def _call(self, call: WrittenCall) -> str:
        return f"{call.name}({', '.join(f'{name}={value!r}' for name, value in call.arguments.items())})"
