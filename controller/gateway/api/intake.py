"""Admission control, and what a request holds of this gateway until it ends: a place, its body's bytes, its choices.

Owns: reading a body within its size and time, counting all this by tenant, refusing what exceeds a limit or a tenant's
share, waiting until all requests have ended. Leaves to others: the rule of shares (scheduling/shares.py), connections
(gateway/connections.py), limits on fields (schema.py, workers/params.py) and on tokens a slow reader has not read
(streams/inbox.py).
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from aiohttp import web

from lorafleet.controller.gateway.api.auth import TENANT
from lorafleet.controller.gateway.limits import Limits
from lorafleet.workers.errors import BodyTooLargeError, DrainingError, InvalidRequestError, QueueFullError
from lorafleet.workers.scheduling.shares import Refusal, Shares


class Intake:
    """The admission control of one gateway."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.num_in_flight = 0  # requests
        self.draining = False
        # A quarter of the connections is left to those that wait for their turn or check the server's state.
        self.requests = Shares(max(1, limits.max_connections * 3 // 4))
        self.choices = Shares(limits.max_in_flight)
        self.bytes = Shares(limits.max_buffered_bytes)
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self, request: web.Request) -> Place:
        """Return a place for one request, as a context. Raises DrainingError or QueueFullError."""
        if self.draining:
            raise DrainingError("This gateway is shutting down and takes no new requests. Send it again.")
        tenant = request[TENANT].name
        refusal = self.requests.take(tenant)
        if refusal is not None:
            raise _full(refusal, 1, "requests", "--max-connections")
        self.num_in_flight += 1
        self._idle.clear()
        return Place(self, request, tenant)

    def leave(self, tenant: str) -> None:
        """Release one request's place."""
        self.requests.give_back(tenant)
        self.num_in_flight -= 1
        if not self.num_in_flight:
            self._idle.set()

    async def idle(self, timeout_s: float) -> bool:
        """Wait until no request is in flight; return False after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


class Place:
    """The resources of one request, released when the context ends."""

    def __init__(self, intake: Intake, request: web.Request, tenant: str) -> None:
        self._intake = intake
        self._request = request
        self._tenant = tenant
        self._num_bytes = 0
        self._num_choices = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        intake = self._intake
        if self._num_bytes:
            intake.bytes.give_back(self._tenant, self._num_bytes)
        if self._num_choices:
            intake.choices.give_back(self._tenant, self._num_choices)
        intake.leave(self._tenant)

    async def read_body(self) -> bytes:
        """Read a JSON body. Raises BodyTooLargeError, before reading if the length is declared."""
        request, limits = self._request, self._intake.limits
        encoding = request.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise InvalidRequestError(f"Content-Encoding {encoding[:32]!r} is not supported. Send the body as it is.")
        if request.content_type != "application/json":
            raise InvalidRequestError(
                f"The body's Content-Type is {request.content_type[:64]!r}. Send 'Content-Type: application/json'."
            )
        too_large = f"over the limit of {limits.max_body_bytes} bytes. Send less, or raise --max-body-bytes."
        if request.content_length is not None and request.content_length > limits.max_body_bytes:
            raise BodyTooLargeError(f"The body has {request.content_length} bytes, {too_large}")
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                while part := await request.content.readany():
                    if self._num_bytes + len(part) > limits.max_body_bytes:
                        raise BodyTooLargeError(f"The body is {too_large}")
                    self._take_bytes(len(part))
                    parts.append(part)
        except TimeoutError:
            raise InvalidRequestError(
                f"The body did not arrive within {limits.body_timeout_s:g} s, --body-timeout-s."
            ) from None
        return b"".join(parts)

    def take_choices(self, num_choices: int, *, param: str) -> None:
        """Count the choices that the request asks for. param: the field that says how many. Raises QueueFullError, or
        InvalidRequestError for more than one client may ever have."""
        most = self._intake.choices.most(self._tenant)
        if num_choices > most:
            raise InvalidRequestError(
                f"The request asks for {num_choices} choices; one client may have {most} at a time, by "
                "--max-in-flight. Ask for less.",
                param=param,
            )
        refusal = self._intake.choices.take(self._tenant, num_choices)
        if refusal is not None:
            raise _full(refusal, num_choices, "choices", "--max-in-flight")
        self._num_choices += num_choices

    def _take_bytes(self, num_bytes: int) -> None:
        refusal = self._intake.bytes.take(self._tenant, num_bytes)
        if refusal is not None:
            raise _full(refusal, num_bytes, "bytes of requests' bodies", "--max-buffered-bytes")
        self._num_bytes += num_bytes


def _full(refusal: Refusal, num_wanted: int, what: str, flag: str) -> QueueFullError:
    others = refusal.num_holders - 1
    share = f"; your share beside {others} others is {refusal.share}" if others else ""
    return QueueFullError(
        f"This gateway holds {refusal.num_taken} of at most {refusal.limit} {what} ({flag}), {refusal.num_held} of "
        f"them yours{share}. There is no room for {num_wanted} more now. Try again later."
    )
