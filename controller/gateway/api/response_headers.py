"""Headers that every answer carries, whether it is an object, a stream or an error.

Owns: when they are added: as the answer begins. Leaves to others: each header's text.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from lorafleet.controller.gateway.api import ignored_fields, request_id
from lorafleet.controller.gateway.api.cors import add_cors_headers
from lorafleet.controller.gateway.cross_origin import CrossOrigin


def response_headers(allowed: CrossOrigin) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """Return the function to call before an answer's headers are sent."""

    async def add(request: web.Request, response: web.StreamResponse) -> None:
        if (number := request.get(request_id.REQUEST_ID)) is not None:
            response.headers[request_id.HEADER] = number
        if names := request.get(ignored_fields.IGNORED_FIELDS):
            response.headers[ignored_fields.HEADER] = names
        add_cors_headers(allowed, request, response)

    return add
