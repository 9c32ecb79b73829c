"""Tells clients and the log which fields of requests are ignored.

Owns: the header's text, bounded and of safe characters; logging each name once, in bounded memory. Leaves to others:
which fields those are (body.py).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Final

from aiohttp import web

HEADER: Final = "x-lorafleet-ignored-fields"
MAX_NAMES: Final = 16  # of one request
MAX_NAME_CHARS: Final = 64
MAX_LOGGED: Final = 1000  # names, which clients can make up

IGNORED_FIELDS: Final = web.RequestKey("ignored_fields", str)
"""The header's text, for a request with such fields."""

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")

logger = logging.getLogger(__name__)


class IgnoredFields:
    """Writes the header of each request, and a log line for each new name."""

    def __init__(self, max_logged: int = MAX_LOGGED) -> None:
        self._max_logged = max_logged
        self._logged: set[str] = set()

    def text(self, names: Sequence[str]) -> str:
        """Return the header's text for the ignored fields of one request, and log those that are new."""
        shown = [_UNSAFE.sub("?", name[:MAX_NAME_CHARS]) or "?" for name in names[:MAX_NAMES]]
        self._log([name for name in dict.fromkeys(shown) if name not in self._logged])
        if len(names) > MAX_NAMES:
            shown.append(f"and {len(names) - MAX_NAMES} more")
        return ", ".join(shown)

    def _log(self, names: Sequence[str]) -> None:
        new = names[: self._max_logged - len(self._logged)]
        if not new:
            return
        self._logged.update(new)
        logger.warning("ignored, since this server has no such field: %s (each is logged once)", ", ".join(new))
        if len(self._logged) == self._max_logged:
            logger.warning("%d names of ignored fields were logged; no more will be", self._max_logged)
