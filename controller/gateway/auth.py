"""API keys: every path asks for one, if there are any, except those that say whether the process is well.

Owns: the check. Leaves to others: where keys come from (__main__.py).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from lorafleet.workers.errors import AuthenticationError

OPEN_PATHS: Final = frozenset({"/health", "/ready", "/ping"})


class ApiKeys:
    """Keys known by their SHA-256; the keys themselves are not kept."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def check(self, header: str | None) -> None:
        """header: of `Authorization`. Raises AuthenticationError. Takes the same time whichever key is nearly right."""
        if not self._digests:
            return
        scheme, _, key = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError("This server asks for an API key. Send it as 'Authorization: Bearer KEY'.")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise AuthenticationError("The API key is not known to this server.")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def auth_middleware(keys: ApiKeys) -> Middleware:
    """Refuse by default; `OPEN_PATHS` is all that goes without a key."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in OPEN_PATHS:
            keys.check(request.headers.get("Authorization"))
        return await handler(request)

    return check
