"""API keys: every path asks for one, if there are any, except those that say whether the process is well.

Owns: the check, and whose a request is. Leaves to others: where keys come from (__main__.py, tenants.py).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from lorafleet.controller.gateway.tenants import Tenant
from lorafleet.workers.errors import AuthenticationError

TENANT: Final = web.RequestKey("tenant", Tenant)
"""Of every request that is not for one of `OPEN_PATHS`."""
OPEN_PATHS: Final = frozenset({"/health", "/ready", "/ping"})


class ApiKeys:
    """Keys known by their SHA-256; the keys themselves are not kept."""

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        """tenants: by key; without any, no key is asked for."""
        self._tenants = {_digest(key): tenant for key, tenant in tenants.items()}

    def check(self, header: str | None) -> Tenant:
        """Whose key `header`, of `Authorization`, has. Takes the same time whichever key is nearly right.

        Raises AuthenticationError.
        """
        if not self._tenants:
            return Tenant()
        scheme, _, key = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError("This server asks for an API key. Send it as 'Authorization: Bearer KEY'.")
        digest = _digest(key.strip())
        matches = [tenant for known, tenant in self._tenants.items() if hmac.compare_digest(digest, known)]
        if not matches:
            raise AuthenticationError("The API key is not known to this server.")
        return matches[0]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def auth_middleware(keys: ApiKeys) -> Middleware:
    """Refuse by default; `OPEN_PATHS` is all that goes without a key."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.rstrip("/") not in OPEN_PATHS:
            request[TENANT] = keys.check(request.headers.get("Authorization"))
        return await handler(request)

    return check
