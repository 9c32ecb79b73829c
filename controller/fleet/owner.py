"""Detects the end of the command that owns a fleet on a shared cluster (`lorafleet serve --ray-address`).

The command ends its fleet itself if it can. This covers a command that was killed, or whose node was lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from lorafleet.controller.fleet.cluster import WorkerLost

LOOK_S = 2.0
GRACE_S = 5.0  # in addition to the time the command's gateways have to drain


class Cluster(Protocol):
    """The part of cluster.py's `WorkerCluster` used here."""

    def has_owner(self, owner: str) -> bool: ...


async def owner_has_ended(
    cluster: Cluster, owner: str, drain_timeout_s: float, tell: Callable[[str, int], None]
) -> None:
    """Wait until the owner has ended and its gateways have had the time to finish their requests.

    A cluster that does not answer does not count as the owner's end.
    """
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            if not await asyncio.to_thread(cluster.has_owner, owner):
                break
        except WorkerLost:
            continue
    tell("the command that owns this fleet has ended; the fleet ends too", logging.WARNING)
    await asyncio.sleep(drain_timeout_s + GRACE_S)
