"""Which nodes of a Ray cluster run gateways: an actor for them on each node that is to have some, as nodes come and go.

Owns: keeping it so. Leaves to others: Ray (cluster.py), the processes on a node (gateway_host.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from lorafleet.controller.cluster import Node, WorkerLost
from lorafleet.controller.config import GatewayNodes, ServeConfig
from lorafleet.controller.gateway_host import GatewayHostActor

logger = logging.getLogger(__name__)

LOOK_S = 5.0
START_TIMEOUT_S = 120.0


class Cluster(Protocol):
    """What is asked of cluster.py's `WorkerCluster`."""

    def nodes(self) -> list[Node]: ...
    def gateway_nodes(self) -> set[str]: ...
    def host_gateways(self, node_id: str, actor: type, *args: object) -> None: ...
    async def gateways_listen(self, node_id: str, timeout_s: float) -> str: ...
    async def drain_gateways(self, node_id: str, timeout_s: float) -> None: ...
    def remove_gateways(self, node_id: str) -> None: ...


class GatewayPlacement:
    """`follow` it for as long as the fleet runs."""

    def __init__(
        self,
        cluster: Cluster,
        where: GatewayNodes,
        config: ServeConfig,
        *,
        controller: str,
        token: str,
        tell: Callable[[str, int], None],
    ) -> None:
        """controller: host:port. tell: an event's line and log level."""
        self._cluster = cluster
        self._where = where
        self._arguments = config, controller, token
        self._tell = tell
        self._listening: dict[str, Node] = {}  # by node id
        self._drained: set[str] = set()  # ids of nodes that are to have none

    @property
    def addresses(self) -> Sequence[str]:
        """Of the nodes whose gateways listen."""
        return sorted(node.address for node in self._listening.values())

    async def follow(self, on_first: Callable[[str], None]) -> None:
        """Keep gateways where they are to be. on_first: called when all nodes there were at first have theirs, with why
        some have not, or nothing."""
        if self._where == "none":
            on_first("")
            return
        first: Callable[[str], None] | None = on_first
        while True:
            try:
                failure = await self._look()
                if first is not None:
                    first(failure)
                    first = None
            except WorkerLost as lost:  # a head node that is away for a while
                logger.warning("nodes cannot be looked up: %s", lost)
            await asyncio.sleep(LOOK_S)

    async def drain(self, node_id: str, timeout_s: float) -> None:
        """Let a node's gateways finish their requests; it gets none until `undrain`."""
        self._drained.add(node_id)
        if self._listening.pop(node_id, None) is not None:
            await self._cluster.drain_gateways(node_id, timeout_s)
            await asyncio.to_thread(self._cluster.remove_gateways, node_id)

    def undrain(self) -> None:
        """Have gateways on drained nodes again."""
        self._drained.clear()

    async def _look(self) -> str:
        """One round; why gateways of new nodes do not listen, or nothing."""
        nodes = await asyncio.to_thread(self._cluster.nodes)
        wanted = {
            node.node_id: node
            for node in nodes
            if (node.is_head or self._where == "all") and node.node_id not in self._drained
        }
        for node_id in await asyncio.to_thread(self._cluster.gateway_nodes) - wanted.keys():
            await asyncio.to_thread(self._cluster.remove_gateways, node_id)
            self._listening.pop(node_id, None)
        failures = await asyncio.gather(
            *(self._start(node) for node in wanted.values() if node.node_id not in self._listening)
        )
        return next(filter(None, failures), "")

    async def _start(self, node: Node) -> str:
        """Have gateways on a node that is new, or whose gateways did not listen the last time."""
        await asyncio.to_thread(self._cluster.host_gateways, node.node_id, GatewayHostActor, *self._arguments)
        failure = await self._cluster.gateways_listen(node.node_id, START_TIMEOUT_S)
        if failure:
            failure = f"On node {node.address}: {failure}"
            self._tell(failure, logging.ERROR)
            await asyncio.to_thread(self._cluster.remove_gateways, node.node_id)
        elif node.node_id not in self._drained:
            self._listening[node.node_id] = node
            self._tell(f"gateways on node {node.address} listen on port {self._arguments[0].port}", logging.INFO)
        return failure
