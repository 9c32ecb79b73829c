"""Bounds on what a client may make this process hold.

Owns: reading a body within its size and time, the number of requests in flight. Leaves to others: bounds on fields
(schema.py, workers/params.py), on what a slow reader leaves unread (inbox.py, sse.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from lorafleet.workers.errors import BodyTooLargeError, DrainingError, InvalidRequestError, QueueFullError


async def read_body(request: web.Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """A JSON body. Raises BodyTooLargeError before anything is read where the length is declared."""
    encoding = request.headers.get("Content-Encoding", "identity").lower()
    if encoding != "identity":
        raise InvalidRequestError(f"Content-Encoding {encoding[:32]!r} is not supported. Send the body as it is.")
    if request.content_type != "application/json":
        raise InvalidRequestError(
            f"The body's Content-Type is {request.content_type[:64]!r}. Send 'Content-Type: application/json'."
        )
    too_large = f"over the limit of {max_bytes} bytes. Send less, or raise --max-body-bytes."
    if request.content_length is not None and request.content_length > max_bytes:
        raise BodyTooLargeError(f"The body has {request.content_length} bytes, {too_large}")
    try:
        async with asyncio.timeout(timeout_s):
            return await request.read()
    except TimeoutError:
        raise InvalidRequestError(f"The body did not arrive within {timeout_s:g} s.") from None
    except web.HTTPRequestEntityTooLarge:
        raise BodyTooLargeError(f"The body is {too_large}") from None


class Admission:
    """Counts the requests that generate something; refuses them beyond the bound and while draining."""

    def __init__(self, max_in_flight: int) -> None:
        self.num_in_flight = 0
        self.draining = False
        self._max_in_flight = max_in_flight
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Around the whole of one request. Raises DrainingError or QueueFullError."""
        if self.draining:
            raise DrainingError("This gateway is shutting down and takes no new requests. Send it again.")
        if self.num_in_flight >= self._max_in_flight:
            raise QueueFullError(f"This gateway has {self._max_in_flight} requests in flight, its limit. Try later.")
        self.num_in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_in_flight -= 1
            if not self.num_in_flight:
                self._idle.set()

    async def idle(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False if that takes too long."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
