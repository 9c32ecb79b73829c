"""Cross-origin requests: which pages of other sites may use this server from a browser.

Owns: the options, named as vLLM's, and what they allow. Leaves to others: HTTP (api/cors.py).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Final

from lorafleet.workers.errors import ConfigError, quoted
from lorafleet.workers.options import check_options, option

ANY: Final = "*"
CROSS_ORIGIN: Final = "cross-origin requests"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9_.:\[\]-]+|null|\*")
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # of a method or a header
_SAFELISTED: Final = frozenset({"accept", "accept-language", "content-language", "content-type"})  # any page sends them


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossOrigin:
    """What pages of other origins may do. Lists may also be JSON arrays, as vLLM takes them."""

    allowed_origins: tuple[str, ...] = option(
        (),
        group=CROSS_ORIGIN,
        metavar="ORIGIN",
        help="origins, such as https://app.example, whose pages may send requests; * is all",
        default_text="none",
    )
    allowed_methods: tuple[str, ...] = option(
        (ANY,), group=CROSS_ORIGIN, metavar="METHOD", help="methods that such pages may use", default_text="* for all"
    )
    allowed_headers: tuple[str, ...] = option(
        (ANY,), group=CROSS_ORIGIN, metavar="HEADER", help="headers that such pages may send", default_text="* for all"
    )
    allow_credentials: bool = option(
        False,
        group=CROSS_ORIGIN,
        help="let such pages send cookies and HTTP authentication; bearer keys do not need it",
    )

    def __post_init__(self) -> None:
        check_options(self)
        origins = _words("--allowed-origins", self.allowed_origins)
        object.__setattr__(self, "allowed_origins", tuple(origin.lower().rstrip("/") for origin in origins))
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--allowed-origins has {quoted(origin)}; an origin is a scheme, a host and perhaps a port, such "
                    "as https://app.example:8443, or * for all."
                )
        for flag, name in (("--allowed-methods", "allowed_methods"), ("--allowed-headers", "allowed_headers")):
            words = _words(flag, getattr(self, name))
            object.__setattr__(self, name, words)
            for word in words:
                if not _TOKEN.fullmatch(word):
                    raise ConfigError(f"{flag} has {quoted(word)}; it must be a name, or * for all.")

    def allows_origin(self, origin: str) -> bool:
        """Return whether pages of the origin may send requests."""
        origin = origin.lower()
        return origin in self.allowed_origins or (ANY in self.allowed_origins and bool(_ORIGIN.fullmatch(origin)))

    def allows_method(self, method: str) -> bool:
        """Return whether they may use the method."""
        return ANY in self.allowed_methods or method in self.allowed_methods

    def allows_header(self, header: str) -> bool:
        """Return whether they may send the header."""
        if ANY in self.allowed_headers:
            return bool(_TOKEN.fullmatch(header))
        return header.lower() in {name.lower() for name in self.allowed_headers} | _SAFELISTED


def _words(flag: str, given: tuple[str, ...]) -> tuple[str, ...]:
    """Return the values, of which each may be a JSON array of several."""
    words: list[str] = []
    for text in given:
        if not text.startswith("["):
            words.append(text)
            continue
        try:
            several = json.loads(text)
        except ValueError:
            several = None
        if not isinstance(several, list) or not all(isinstance(word, str) for word in several):
            raise ConfigError(f"{flag} is {quoted(text)}; it must be words, or a JSON array of strings.")
        words += several
    return tuple(words)
