"""The gateways of one node of a Ray cluster, owned by an actor there: they start and end with it.

Owns: their lives on that node. Leaves to others: the choice of nodes (gateway_placement.py), their command lines
(gateway_processes.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from pathlib import Path

from lorafleet.controller.config import ServeConfig
from lorafleet.controller.fleet.gateway_processes import GatewayProcesses
from lorafleet.controller.fleet.secret_file import write_secret
from lorafleet.controller.fleet.watchdog import under_watch
from lorafleet.workers.errors import ConfigError

logger = logging.getLogger(__name__)

_POLL_S = 0.2


class GatewayHostActor:
    """The actor. All arguments, the API keys among them, are plain data, since Ray keeps them for restarts."""

    def __init__(self, config: ServeConfig, controller: str, token: str) -> None:
        """controller: host:port."""
        logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
        self._directory = tempfile.TemporaryDirectory(prefix="lorafleet-gateways-")
        state_dir = Path(self._directory.name)
        self._gateways = GatewayProcesses(config, controller, write_secret(state_dir / "token", token))
        self._gateways.__enter__()
        loop = asyncio.get_running_loop()
        self._run = loop.create_task(self._keep())
        self._watched = loop.create_task(under_watch())

    async def ready(self) -> str:
        """Wait until all gateways listen. Return why they cannot, or an empty string."""
        while not self._gateways.are_listening:
            try:
                self._gateways.check()
            except ConfigError as error:
                return error.message
            await asyncio.sleep(_POLL_S)
        return ""

    async def drain(self, timeout_s: float) -> None:
        """Let the gateways finish their requests, for at most `timeout_s`, and exit."""
        self._run.cancel()
        self._gateways.terminate()
        try:
            async with asyncio.timeout(timeout_s):
                while not self._gateways.have_ended:  # noqa: ASYNC110 (processes offer no event)
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            logger.warning("gateways did not end within %g s", timeout_s)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            for lost in self._gateways.replace_lost():
                logger.warning("on %s %s", os.uname()[1], lost)
