"""The end of a fleet that belongs to a command on a shared cluster (`lorafleet serve --ray-address`).

The command itself ends its fleet when it can. This is for one that was killed, or lost its node.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from lorafleet.controller.fleet.cluster import WorkerLost

LOOK_S = 2.0
GRACE_S = 5.0  # beyond the drain of the command's gateways


class Cluster(Protocol):
    """What is asked of cluster.py's `WorkerCluster`."""

    def has_owner(self, owner: str) -> bool: ...


async def owner_has_ended(
    cluster: Cluster, owner: str, drain_timeout_s: float, tell: Callable[[str, int], None]
) -> None:
    """Wait until the owner has ended, and its gateways too, which finish their requests by themselves.

    A cluster that does not answer is no sign of it.
    """
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            if not await asyncio.to_thread(cluster.has_owner, owner):
                break
        except WorkerLost:
            continue
    tell("the command that this fleet belongs to has ended; the fleet ends too", logging.WARNING)
    await asyncio.sleep(drain_timeout_s + GRACE_S)
