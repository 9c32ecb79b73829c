"""Client connections: their number, the time for a request's head, disconnecting clients that read nothing.

Owns: these limits, which aiohttp lacks. Leaves to others: bodies (api/intake.py), parsing requests (aiohttp,
api/app.py).

The operating system also buffers output for a client that does not read. Its buffer is kept small so that such a client
is noticed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import struct
from typing import Any, Final, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from lorafleet.controller.gateway.api.errors import error_json, error_response
from lorafleet.controller.gateway.limits import Limits
from lorafleet.workers.errors import InvalidRequestError, LoRAFleetError, QueueFullError
from lorafleet.workers.scheduling.shares import Shares

KEEP_ALIVE_S: Final = 75.0  # longer than proxies and clients keep connections, so that they close them first
MIN_BYTES_A_SECOND: Final = 1024  # minimum read rate of a client while output waits for it
_SYSTEM_BYTES: Final = 4 << 10  # unsent, of one connection, in the operating system
_BUFFER_BYTES: Final = 16 << 10  # of one connection, here, before its client counts as not reading
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER with a timeout of 0
_LINGER_S: Final = 1.0  # time for a refusal to arrive
_MAX_LINGERING: Final = 100

logger = logging.getLogger(__name__)


class Connections:
    """All open connections. Calling it returns the protocol for a new one."""

    def __init__(self, server: web.Server, limits: Limits) -> None:
        """server: handles their requests."""
        self.limits = limits
        self.shares = Shares(limits.max_connections)
        self.num_lingering = 0  # refused and not yet closed
        self._server = server
        self._loop = asyncio.get_running_loop()

    def __call__(self) -> Connection:
        return Connection(self, self._server, loop=self._loop)


class Connection(web.RequestHandler):
    """One client connection."""

    __slots__ = ("_all", "_holder", "_open", "_refused", "_timer", "_unread_bytes", "_write_timer")

    def __init__(self, connections: Connections, server: web.Server, *, loop: asyncio.AbstractEventLoop) -> None:
        options: dict[str, Any] = {"access_log": None}  # aiohttp then writes none
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=KEEP_ALIVE_S,
            lingering_time=2.0,  # time for reading and dropping a refused body, so that the answer arrives
            auto_decompress=False,  # a small body must not become a large one (api/intake.py refuses encodings)
            **options,
        )
        self._all = connections
        self._holder = ""  # of its place: the client's network
        self._open: asyncio.Transport | None = None  # until it is lost; aiohttp drops its own on starting to close
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None  # for the head being received
        self._unread_bytes = 0  # when the client was last seen to read
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._open = transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self._holder = _network(peer[0]) if isinstance(peer, tuple) else "local"
        if self._all.shares.take(self._holder) is not None:
            self._refuse(transport)
            return
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _SYSTEM_BYTES)
        transport.set_write_buffer_limits(high=_BUFFER_BYTES)
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._open = None
        self._head_came()
        self._stop_write_timer()
        if self._refused:
            self._all.num_lingering -= 1
        else:
            self._all.shares.give_back(self._holder)
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        num_heads = self._request_count
        super().data_received(data)
        if self._request_count != num_heads:
            self._head_came()
        elif self._waiter is not None and self._timer is None:  # no request runs: the next one begins
            self._await_head()

    async def start(self) -> None:
        """Serve requests. Afterwards close the connection once the client has read what waits for it."""
        try:
            await super().start()
        finally:
            if self._open is not None and self._write_timer is None:
                self._watch_reader(self._open)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._open is not None and self._write_timer is None:
            self._watch_reader(self._open)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._open is not None and not self._open.is_closing():
            self._stop_write_timer()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer what is not HTTP, without a traceback; any other error is a bug of ours."""
        if not isinstance(exc, HttpProcessingError) or request.writer.output_size:
            return super().handle_error(request, status, exc, message)
        said = " ".join(exc.message.split())[:200].rstrip(".")
        logger.debug("a client at %s sent something other than HTTP: %s", self._holder, said)
        response = error_response(InvalidRequestError(f"This is not a valid HTTP/1.1 request: {said}."))
        response.force_close()
        return response

    def _await_head(self) -> None:
        self._timer = self._loop.call_later(self._all.limits.header_timeout_s, self._head_is_late)

    def _head_came(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _head_is_late(self) -> None:
        self._timer = None
        if self.transport is None or self._waiter is None:
            return
        timeout_s = self._all.limits.header_timeout_s
        error = InvalidRequestError(f"The request's head did not arrive within {timeout_s:g} s, --header-timeout-s.")
        self.transport.write(_closing("408 Request Timeout", error))
        self.force_close()

    def _watch_reader(self, transport: asyncio.Transport) -> None:
        self._unread_bytes = transport.get_write_buffer_size()
        self._write_timer = self._loop.call_later(self._all.limits.write_timeout_s, self._check_reader)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _check_reader(self) -> None:
        """Disconnect the client if it has read next to nothing; its requests end too."""
        self._write_timer = None
        transport = self._open
        if transport is None or not (left := transport.get_write_buffer_size()):
            return
        if self._unread_bytes - left >= MIN_BYTES_A_SECOND * self._all.limits.write_timeout_s:
            self._watch_reader(transport)
            return
        logger.info("a client at %s is disconnected: %d bytes wait for it to read", self._holder, left)
        sock = transport.get_extra_info("socket")
        if sock is not None:  # reset it, or the system would keep its buffer for the client
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        transport.abort()

    def _refuse(self, transport: asyncio.Transport) -> None:
        """Report that there are too many connections, and close this one once the client has the answer."""
        self._refused = True
        self._all.num_lingering += 1
        error = QueueFullError(
            f"This gateway has {self._all.shares.num_taken} of at most {self._all.limits.max_connections} connections "
            f"(--max-connections), {self._all.shares.held(self._holder)} of them from your address. Try again later."
        )
        transport.write(_closing("503 Service Unavailable", error, "Retry-After: 1\r\n"))
        if self._all.num_lingering > _MAX_LINGERING or not transport.can_write_eof():
            transport.close()
        else:
            transport.write_eof()
            self._loop.call_later(_LINGER_S, transport.abort)


def _closing(status: str, error: LoRAFleetError, headers: str = "") -> bytes:
    """Return an answer that belongs to no request."""
    body = error_json(error)
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}"
    return head.encode() + b"Connection: close\r\n\r\n" + body


def _network(address: str) -> str:
    """Return the client's address, or its /64 network for IPv6, in which one client has many addresses."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    mapped = parsed.ipv4_mapped  # an IPv4 client on a socket for both versions
    return str(mapped if mapped is not None else ipaddress.ip_network((parsed, 64), strict=False))
