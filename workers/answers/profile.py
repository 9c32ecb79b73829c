"""A profile: how a model or an adapter writes its answers, in ``lorafleet.json`` among its files.

{"tool_call_parser": "hermes", "reasoning_parser": "qwen3", "structured_outputs": {"json": {"type": "object"}}}
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from lorafleet.workers.answers.reasoning import REASONING_FORMATS
from lorafleet.workers.answers.tool_formats import TOOL_FORMATS
from lorafleet.workers.errors import ModelError, quoted

PROFILE_FILE: Final = "lorafleet.json"
_CHOICES: Final[dict[str, Collection[str]]] = {
    "tool_call_parser": TOOL_FORMATS,
    "reasoning_parser": REASONING_FORMATS,
}


@dataclass(frozen=True, slots=True)
class Profile:
    """The parsers of an answer, by name. None: as the server is configured.

    structured_outputs: what an answer must be if its request does not say so, as requests do.
    """

    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    structured_outputs: Mapping[str, Any] | None = None


def read_profile(data: bytes) -> Profile:
    """Return the profile in a file. Raises `ModelError`."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{PROFILE_FILE} is not JSON.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{PROFILE_FILE} must be an object.")
    known = {field.name for field in fields(Profile)}
    for name, value in values.items():
        if name not in known:
            raise ModelError(f"{PROFILE_FILE} has {quoted(name)}; it may have {', '.join(sorted(known))}.")
        if name == "structured_outputs":
            if value is not None and not isinstance(value, dict):
                raise ModelError(f"{name} of {PROFILE_FILE} is {quoted(value)}; it must be an object.")
        elif value is not None and (not isinstance(value, str) or value not in _CHOICES[name]):
            raise ModelError(
                f"{name} of {PROFILE_FILE} is {quoted(value)}; it must be one of {', '.join(sorted(_CHOICES[name]))}."
            )
    return Profile(**values)
