"""API keys: if there are any, every path requires one, except health checks.

Owns: the check, and the tenant of a request. Leaves to others: where keys come from (gateway/__main__.py,
gateway/tenants.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from lorafleet.controller.gateway.tenants import Tenant
from lorafleet.workers.errors import AuthenticationError, PermissionDeniedError

TENANT: Final = web.RequestKey("tenant", Tenant)
"""Set for every request to a path outside `OPEN_PATHS`."""
OPEN_PATHS: Final = frozenset({"/health", "/ready", "/ping"})


class ApiKeys:
    """API keys, stored only as their SHA-256."""

    def __init__(self, tenants: Mapping[str, Tenant], *, is_open: bool | None = None) -> None:
        """tenants: by key. is_open: no key is required (administrators may have one); by default, if there are none."""
        self._tenants = {_digest(key): tenant for key, tenant in tenants.items()}
        self._is_open = not tenants if is_open is None else is_open
        self._anybody = Tenant(is_admin=not tenants)

    def check(self, header: str | None) -> Tenant:
        """Return the tenant whose key is in the `Authorization` header. Raises AuthenticationError."""
        scheme, _, key = (header or "").partition(" ")
        # Looked up by digest, so that the time it takes reveals nothing about the keys.
        tenant = self._tenants.get(_digest(key.strip())) if scheme.lower() == "bearer" else None
        if tenant is not None:
            return tenant
        if self._is_open:
            return self._anybody
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError("This server requires an API key. Send it as 'Authorization: Bearer KEY'.")
        raise AuthenticationError("The API key is not known to this server.")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def check_admin(request: web.Request) -> None:
    """Raises PermissionDeniedError if the client may not change what the server serves."""
    if not request[TENANT].is_admin:
        raise PermissionDeniedError(
            "This API key may not load or unload adapters. Send a key of --admin-api-key or, if the server has none, "
            "its first key."
        )


def auth_middleware(keys: ApiKeys) -> Middleware:
    """Return the middleware that requires a key on every path outside `OPEN_PATHS`."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.rstrip("/") not in OPEN_PATHS:
            request[TENANT] = keys.check(request.headers.get("Authorization"))
        return await handler(request)

    return check
