"""A log line for each answered request.

Owns: the line's content, writing it. Leaves to others: metrics (metrics/instruments.py), errors and their traces
(errors.py).
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler

from lorafleet.controller.gateway.api.auth import OPEN_PATHS, TENANT
from lorafleet.controller.gateway.api.request_id import REQUEST_ID
from lorafleet.workers.errors import cut

MAX_LINES: Final = 10_000  # waiting to be written
_END_S = 1.0
_UNLOGGED: Final = OPEN_PATHS | {"/metrics", "/fleet", "/v1/fleet"}  # polled by machines


class AccessLog:
    """Writes lines in a thread of its own. If the output blocks (a stopped terminal), lines are lost and no request
    waits. Call `close` at the end."""

    def __init__(self, fd: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._fd = fd
        self._clock = clock
        self._lines: queue.Queue[str] = queue.Queue(MAX_LINES)
        self._num_lost = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write, name="access log", daemon=True)
        self._thread.start()

    def add(self, line: str) -> None:
        """Queue a line. Never waits."""
        try:
            self._lines.put_nowait(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        except queue.Full:
            self._num_lost += 1

    def close(self) -> None:
        """Write the queued lines, for at most a second."""
        self._closing.set()
        self._thread.join(_END_S)

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Log each answer. Outermost, so a stream's line is written at its end; 499 if the client disconnected."""
        began, status = self._clock(), 500
        try:
            response = await handler(request)
            status = response.status
            return response
        except asyncio.CancelledError:
            status = 499
            raise
        finally:
            if request.rel_url.raw_path.rstrip("/") not in _UNLOGGED:
                self.add(_line(request, status, self._clock() - began))

    def _write(self) -> None:
        while not (self._closing.is_set() and self._lines.empty()):
            try:
                lines = [self._lines.get(timeout=0.1)]
            except queue.Empty:
                continue
            while not self._lines.empty() and len(lines) < 1000:
                lines.append(self._lines.get_nowait())
            if self._num_lost:
                lines.append(f"{self._num_lost} lines were lost here\n")
                self._num_lost = 0
            data = "".join(lines).encode()
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            except OSError:  # the output is closed
                return


def _line(request: web.Request, status: int, seconds: float) -> str:
    # The client chose the path: none of its characters may end the line or begin another one.
    path = cut(ascii(request.rel_url.raw_path)[1:-1])
    tenant = request.get(TENANT)
    whose = f" {ascii(tenant.name)[1:-1]}" if tenant is not None and tenant.name else ""
    number = request.get(REQUEST_ID, "-")
    return (
        f'{request.remote or "-"}{whose} "{cut(request.method)} {path}" {status} in {seconds:.3f} s, request {number}'
    )
