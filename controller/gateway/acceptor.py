"""Accepts client connections, a few in each turn of the event loop.

The servers of asyncio and uvloop accept all pending connections in one turn, which stops every stream while a client
opens a thousand. Owns: the listening sockets. Leaves to others: what a connection does (connections.py).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Any, Final

MAX_AT_ONCE: Final = 16  # some 70 µs each
_BACKLOG: Final = 1024
_RETRY_S: Final = 1.0
_EXHAUSTED: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

logger = logging.getLogger(__name__)


class Acceptor:
    """Call `listen`, then `close`. Open connections outlive it."""

    def __init__(self, make_protocol: Callable[[], asyncio.BaseProtocol]) -> None:
        self._make_protocol = make_protocol
        self._loop = asyncio.get_running_loop()
        self._sockets: list[socket.socket] = []
        self._retries: dict[socket.socket, asyncio.TimerHandle] = {}
        self._opening: set[asyncio.Task[Any]] = set()

    async def listen(self, host: str, port: int, *, reuse_port: bool = False) -> int:
        """Accept connections on each address of `host`; empty: on all of the machine's.

        port: 0 takes a free one. Return the port. Raises `OSError` if it is not available.
        """
        try:
            found = await self._loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except UnicodeError as error:
            raise OSError(errno.EADDRNOTAVAIL, "the host is no name that can be looked up") from error
        refused: OSError | None = None
        for family, *_, (name, _, *rest) in dict.fromkeys(found):
            try:
                listening = socket.create_server(
                    (name, port, *rest), family=family, backlog=_BACKLOG, reuse_port=reuse_port
                )
            except OSError as error:
                if error.errno != errno.EAFNOSUPPORT:  # else the machine has no such addresses, IPv6 for example
                    self.close()
                    raise
                refused = error
                continue
            listening.setblocking(False)
            self._sockets.append(listening)
            port = int(listening.getsockname()[1])
        if not self._sockets:
            raise refused or OSError(errno.EADDRNOTAVAIL, f"{host!r} has no address")
        for listening in self._sockets:
            self._loop.add_reader(listening, self._accept, listening)
        return port

    def close(self) -> None:
        """Accept no more."""
        for retry in self._retries.values():
            retry.cancel()
        self._retries.clear()
        for listening in self._sockets:
            self._loop.remove_reader(listening)
            listening.close()
        self._sockets.clear()

    def _accept(self, listening: socket.socket) -> None:
        """Accept some; the loop calls again while more are pending."""
        for _ in range(MAX_AT_ONCE):
            try:
                connection, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause(listening, error)
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._open(connection))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection)
        except OSError:  # it was closed meanwhile
            connection.close()

    def _pause(self, listening: socket.socket, error: OSError) -> None:
        """Leave connections pending for a while; those that are open may end."""
        if error.errno not in _EXHAUSTED:
            logger.error("a connection cannot be accepted", exc_info=error)
        else:
            logger.warning("connections wait: %s", error.strerror)
        self._loop.remove_reader(listening)
        self._retries[listening] = self._loop.call_later(_RETRY_S, self._resume, listening)

    def _resume(self, listening: socket.socket) -> None:
        del self._retries[listening]
        self._loop.add_reader(listening, self._accept, listening)
