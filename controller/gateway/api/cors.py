"""Cross-origin requests over HTTP: preflights, and the headers by which browsers let a page read an answer.

Owns: the protocol (https://fetch.spec.whatwg.org/#http-cors-protocol). Leaves to others: what is allowed
(gateway/cross_origin.py).
"""

from __future__ import annotations

from typing import Final

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from lorafleet.controller.gateway.api import ignored_fields, request_id
from lorafleet.controller.gateway.cross_origin import ANY, CrossOrigin
from lorafleet.workers.errors import PermissionDeniedError, quoted

_MAX_AGE_S: Final = 600  # browsers need not ask again before
_METHODS: Final = "GET, POST, OPTIONS"
_EXPOSED: Final = ", ".join((request_id.HEADER, ignored_fields.HEADER, hdrs.RETRY_AFTER))


def preflight_middleware(allowed: CrossOrigin) -> Middleware:
    """Return the middleware that answers preflights, which browsers send without a key."""

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        headers = request.headers
        method = headers.get(hdrs.ACCESS_CONTROL_REQUEST_METHOD)
        if request.method != hdrs.METH_OPTIONS or hdrs.ORIGIN not in headers or method is None:
            return await handler(request)
        wanted = [name.strip() for name in headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "").split(",")]
        wanted = [name for name in wanted if name]
        _check(allowed, headers[hdrs.ORIGIN], method, wanted)
        response = web.Response(status=204)
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = (
            _METHODS if ANY in allowed.allowed_methods else ", ".join(allowed.allowed_methods)
        )
        if wanted:  # repeated, since with credentials * would not stand for all
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = ", ".join(wanted)
        response.headers[hdrs.ACCESS_CONTROL_MAX_AGE] = str(_MAX_AGE_S)
        return response

    return answer


def add_cors_headers(allowed: CrossOrigin, request: web.Request, response: web.StreamResponse) -> None:
    """Let a page of an allowed origin read the answer."""
    if not allowed.allowed_origins:
        return
    origin = request.headers.get(hdrs.ORIGIN)
    headers = response.headers
    every = ANY in allowed.allowed_origins and not allowed.allow_credentials
    if not every:
        headers.add(hdrs.VARY, hdrs.ORIGIN)
    if origin is None or not allowed.allows_origin(origin):
        return
    headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = ANY if every else origin
    headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED
    if allowed.allow_credentials:
        headers[hdrs.ACCESS_CONTROL_ALLOW_CREDENTIALS] = "true"


def _check(allowed: CrossOrigin, origin: str, method: str, wanted: list[str]) -> None:
    if not allowed.allows_origin(origin):
        raise PermissionDeniedError(f"Pages of {quoted(origin)} may not use this server. See --allowed-origins.")
    if not allowed.allows_method(method):
        raise PermissionDeniedError(f"Such pages may not use the method {quoted(method)}. See --allowed-methods.")
    for name in wanted:
        if not allowed.allows_header(name):
            raise PermissionDeniedError(f"Such pages may not send the header {quoted(name)}. See --allowed-headers.")
