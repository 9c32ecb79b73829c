"""API keys from a command line or the environment.

Owns: their forms and limits. Leaves to others: the tenant of a key (tenants.py), the check of a request's key
(api/auth.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Final

from lorafleet.workers.errors import ConfigError

API_KEY_VARIABLE: Final = "LORAFLEET_API_KEY"
ADMIN_KEY_VARIABLE: Final = "LORAFLEET_ADMIN_API_KEY"
MAX_KEY_CHARS: Final = 1024
WEAK_KEY_CHARS: Final = 16  # a shorter key is reported as weak


def keys_of_variable(name: str) -> list[str]:
    """Return the variable's keys; none if it is unset or empty. Raises `ConfigError`, whose text contains no key."""
    text = os.environ.get(name, "")
    if not text:
        return []
    if text.lstrip().startswith("["):
        try:
            keys = json.loads(text)
        except (ValueError, RecursionError):
            keys = None
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ConfigError(f"${name} begins with [ but is not a JSON array of strings.")
    else:
        keys = [key.strip() for key in text.split(",") if key.strip()]
    if not keys:
        raise ConfigError(f"${name} is set but has no key in it. Unset it to require none.")
    return keys


def as_environment(api_keys: Sequence[str], admin_api_keys: Sequence[str]) -> dict[str, str]:
    """Return an environment with these keys and no others. A command line is visible to every user of a machine."""
    given = {API_KEY_VARIABLE: api_keys, ADMIN_KEY_VARIABLE: admin_api_keys}
    inherited = {name: value for name, value in os.environ.items() if name not in given}
    return inherited | {name: json.dumps(list(keys)) for name, keys in given.items() if keys}


def check_keys(where: str, keys: Iterable[str]) -> None:
    """Raises `ConfigError` for a key that no client could send. where: the source of the keys, such as a flag."""
    for key in keys:
        if not key:
            raise ConfigError(f"{where} has an API key that is empty; give a key, or leave it out to require none.")
        if len(key) > MAX_KEY_CHARS:
            raise ConfigError(f"{where} has an API key of {len(key)} characters; the limit is {MAX_KEY_CHARS}.")
        if not all("!" <= char <= "~" for char in key):
            raise ConfigError(
                f"{where} has an API key with white space or a character that is not ASCII. HTTP headers do not carry "
                "it safely; choose another."
            )


def num_weak(keys: Iterable[str]) -> int:
    """Return the number of keys short enough to be guessed."""
    return sum(len(key) < WEAK_KEY_CHARS for key in keys)
