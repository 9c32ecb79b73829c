"""Errors as HTTP answers: OpenAI's JSON, when to retry.

Owns: the middleware that turns every exception into such an answer and counts it. Leaves to others: the status of each
error (workers/errors.py), errors in mid-stream (sse.py, which sends the same JSON).
"""

from __future__ import annotations

import logging
import math
from typing import Final

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from lorafleet.controller.gateway.api.request_id import REQUEST_ID, give_id
from lorafleet.controller.gateway.api.state import STATE
from lorafleet.workers.errors import (
    AuthenticationError,
    BodyTooLargeError,
    InternalError,
    InvalidRequestError,
    LoRAFleetError,
    MethodNotAllowedError,
    NotFoundError,
    cut,
    status_of,
)

MAX_MESSAGE_CHARS: Final = 2000

logger = logging.getLogger(__name__)


def error_json(error: LoRAFleetError) -> bytes:
    """Return ``{"error": {...}}`` as OpenAI writes it; `reason` only where an adapter was refused."""
    status = status_of(error)
    message = error.message[:MAX_MESSAGE_CHARS].encode(errors="replace").decode()
    body = {"message": message, "type": status.openai_type, "param": error.param, "code": status.code}
    reason = getattr(error, "reason", None)
    if reason is not None:
        body["reason"] = reason
    return msgspec.json.encode({"error": body})


def error_response(error: LoRAFleetError) -> web.Response:
    """Return the answer for a request that failed before its first byte."""
    status = status_of(error)
    response = web.Response(status=status.http, body=error_json(error), content_type="application/json")
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    elif status.http >= 500 or status.http == 409:
        response.headers["x-should-retry"] = "false"  # OpenAI's clients would retry, and fail again
    if isinstance(error, AuthenticationError):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def internal_error(request_id: str) -> InternalError:
    """Return a bug as clients see it: only a pointer to the log."""
    return InternalError(f"Internal error. The server's log has the details under request id {request_id}.")


def named_error(error: Exception, request: web.Request) -> LoRAFleetError:
    """Return the named error for an exception of a handler. Counts it; logs bugs of ours."""
    named = _named(error, request)
    request.app[STATE].metrics.errors.labels(status_of(named).code).inc()
    return named


def _named(error: Exception, request: web.Request) -> LoRAFleetError:
    if isinstance(error, LoRAFleetError):
        if isinstance(error, InternalError):
            logger.error("request %s: %s", request[REQUEST_ID], error.message)
            return internal_error(request[REQUEST_ID])
        return error
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return BodyTooLargeError("The body is larger than this server takes.")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return MethodNotAllowedError(f"{_path(request)} takes {allowed}, not {cut(request.method)}.")
    if isinstance(error, web.HTTPNotFound):
        return NotFoundError(f"There is no {cut(request.method)} {_path(request)}.")
    if isinstance(error, web.HTTPException) and error.status < 500:
        return InvalidRequestError(error.reason)
    logger.error("request %s failed", request[REQUEST_ID], exc_info=error)
    return internal_error(request[REQUEST_ID])


def _path(request: web.Request) -> str:
    """Return the path as it was sent; decoded, it may not be valid Unicode."""
    return cut(request.rel_url.raw_path)


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give each request its id and each failure its answer. Outermost but for the access log."""
    give_id(request)
    try:
        return await handler(request)
    except ConnectionError:  # the client has disconnected; this answer is not sent
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=499)
    except Exception as error:
        response = error_response(named_error(error, request))
        if not request.content.at_eof():
            response.force_close()  # the rest of the body would be read as the next request
        return response
