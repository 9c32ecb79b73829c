"""A request's own variables of a chat template (``chat_template_kwargs``), such as ``enable_thinking``.

Owns: their names, kinds and sizes. Leaves to others: what a template makes of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from lorafleet.workers.errors import InvalidRequestError, quoted

PARAM: Final = "chat_template_kwargs"
MAX_VARIABLES: Final = 32
MAX_TEXT_CHARS: Final = 1024
MAX_NUMBER: Final = 2**53

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_OF_THE_SERVER = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
    | {"raise_exception", "strftime_now", "namespace", "dict", "range", "cycler", "joiner", "lipsum"}
    | {"loop", "self", "caller", "varargs", "kwargs"}
)


def check_template_kwargs(variables: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Return the variables without those that are null.

    Raises InvalidRequestError for a name or a value that no request may set.
    """
    if len(variables) > MAX_VARIABLES:
        raise InvalidRequestError(
            f"{PARAM} has {len(variables)} variables; the limit is {MAX_VARIABLES}. Leave some out.", param=PARAM
        )
    for name, value in variables.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidRequestError(
                f"{PARAM} has the name {quoted(name)}; names are letters, digits and '_', at most 64, and begin with a "
                "letter.",
                param=PARAM,
            )
        if name in _OF_THE_SERVER or name.endswith("_token"):
            raise InvalidRequestError(
                f"{PARAM} sets {quoted(name)}, which the server sets itself. Leave it out.", param=PARAM
            )
        _check_value(name, value)
    return {name: value for name, value in variables.items() if value is not None}


def _check_value(name: str, value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        if len(value) > MAX_TEXT_CHARS:
            raise InvalidRequestError(
                f"{PARAM}.{name} has {len(value)} characters; the limit is {MAX_TEXT_CHARS}.", param=PARAM
            )
    elif not isinstance(value, int | float):
        raise InvalidRequestError(
            f"{PARAM}.{name} is {quoted(value)}; it must be a string, a number, true or false.", param=PARAM
        )
    elif not abs(value) <= MAX_NUMBER:
        raise InvalidRequestError(
            f"{PARAM}.{name} is {quoted(value)}; numbers go from {-MAX_NUMBER} to {MAX_NUMBER}.", param=PARAM
        )
