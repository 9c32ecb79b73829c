"""What requests hold of this gateway from their first byte to their last: a place, their body's bytes, their choices.

Owns: reading a body within its size and time, counting all that by tenant, refusing what is over a bound or a tenant's
share, waiting until nothing is left. Leaves to others: the rule of shares (engine/shares.py), connections
(gateway/connections.py), bounds on fields (schema.py, workers/params.py), on what a slow reader leaves unread
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
    """Of one gateway."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.num_in_flight = 0  # requests
        self.draining = False
        # A quarter of the connections is for those that wait for their turn or ask how the server is.
        self.requests = Shares(max(1, limits.max_connections * 3 // 4))
        self.choices = Shares(limits.max_in_flight)
        self.bytes = Shares(limits.max_buffered_bytes)
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self, request: web.Request) -> Place:
        """A place for the whole of one request: a context. Raises DrainingError or QueueFullError."""
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
        """One request is over."""
        self.requests.give_back(tenant)
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


class Place:
    """What one request holds. All is given back when the context ends."""

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
        """A JSON body. Raises BodyTooLargeError before anything is read where the length is declared."""
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
        """Count what the request asks to be generated. param: the field that says how much. Raises QueueFullError, or
        InvalidRequestError for more than anybody may have."""
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
