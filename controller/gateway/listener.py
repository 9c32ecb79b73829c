"""Serves the HTTP application on a port.

Owns: its start and end, enough file descriptors for its connections. Leaves to others: paths (api/app.py), accepting
(acceptor.py), connections (connections.py), when it starts and ends (server.py).
"""

from __future__ import annotations

import dataclasses
import logging
import resource
from typing import Final

from aiohttp import web

from lorafleet.controller.gateway.acceptor import Acceptor
from lorafleet.controller.gateway.api.access_log import AccessLog
from lorafleet.controller.gateway.api.app import make_app
from lorafleet.controller.gateway.api.state import ABORT_GRACE_S, GatewayState
from lorafleet.controller.gateway.connections import Connections

_OWN_FILES: Final = 128  # descriptors for everything but clients

logger = logging.getLogger(__name__)


class Listener:
    """Call `set_up`, then `listen`, then `close`; `set_up` also starts `state` and `close` closes it."""

    def __init__(self, state: GatewayState, access_log: AccessLog | None = None) -> None:
        self._limits = state.config.limits
        # handler_cancellation: when a client disconnects, its handler is cancelled, and thereby its request on the
        # worker, even before anything was written.
        self._runner = web.AppRunner(
            make_app(state, access_log), handler_cancellation=True, shutdown_timeout=ABORT_GRACE_S
        )
        self._acceptor: Acceptor | None = None
        self.connections: Connections | None = None  # set by `listen`

    async def set_up(self) -> None:
        """Start everything except listening."""
        await self._runner.setup()

    async def listen(self, host: str, port: int, *, reuse_port: bool = False) -> int:
        """Accept connections. Return the port. Raises OSError if it is not available."""
        server = self._runner.server
        assert server is not None
        limits = dataclasses.replace(self._limits, max_connections=_allowed(self._limits.max_connections))
        self.connections = Connections(server, limits)
        self._acceptor = Acceptor(self.connections)
        return await self._acceptor.listen(host, port, reuse_port=reuse_port)

    async def close(self) -> None:
        """End what still runs."""
        if self._acceptor is not None:
            self._acceptor.close()
        await self._runner.cleanup()


def _allowed(num_connections: int) -> int:
    """Raise the limit on open files if needed. Return how many of the connections it then allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + _OWN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            num_connections = max(1, soft - _OWN_FILES)
            logger.warning("--max-connections is reduced to %d by the limit on open files (ulimit -n)", num_connections)
    return num_connections
