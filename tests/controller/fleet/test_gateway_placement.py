"""The placement of gateways on nodes that join and leave. Ray is replaced."""

from __future__ import annotations

import asyncio
import logging

import pytest

from lorafleet.controller.config import GatewayNodes, ServeConfig
from lorafleet.controller.fleet import gateway_placement
from lorafleet.controller.fleet.cluster import Node, WorkerLost
from lorafleet.controller.fleet.gateway_placement import GatewayPlacement
from lorafleet.workers.config import EngineConfig

HEAD, SECOND, THIRD = Node("head", "10.0.0.1", True), Node("n2", "10.0.0.2", False), Node("n3", "10.0.0.3", False)


class FakeCluster:
    """Stands in for `WorkerCluster`."""

    def __init__(self, *nodes: Node) -> None:
        self.alive = list(nodes)
        self.hosts: dict[str, tuple[object, ...]] = {}  # by node id, the arguments of their actors
        self.failures: dict[str, str] = {}
        self.drained: list[str] = []
        self.is_away = False
        self.num_looks = 0

    def nodes(self) -> list[Node]:
        self.num_looks += 1
        if self.is_away:
            raise WorkerLost("the head node is away")
        return list(self.alive)

    def gateway_nodes(self) -> set[str]:
        return set(self.hosts)

    def host_gateways(self, node_id: str, actor: type, *args: object) -> None:
        self.hosts.setdefault(node_id, args)

    async def gateways_listen(self, node_id: str, timeout_s: float) -> str:
        return self.failures.get(node_id, "")

    async def drain_gateways(self, node_id: str, timeout_s: float) -> None:
        self.drained.append(node_id)

    def remove_gateways(self, node_id: str) -> None:
        del self.hosts[node_id]


class Followed:
    """A running placement, and its events."""

    def __init__(self, cluster: FakeCluster, where: GatewayNodes) -> None:
        self.cluster = cluster
        self.said: list[tuple[str, int]] = []
        self.config = ServeConfig(EngineConfig("/model"), ("base",))
        self.placement = GatewayPlacement(
            cluster,
            where,
            self.config,
            controller="10.0.0.1:50050",
            token="token",
            tell=lambda line, level: self.said.append((line, level)),
        )
        self.first: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self.placement.follow(self.first.set_result))

    async def look(self) -> None:
        """Wait until it has looked at the nodes again and acted on that."""
        looks = self.cluster.num_looks
        async with asyncio.timeout(10):
            while self.cluster.num_looks < looks + 2:  # noqa: ASYNC110 (a plain thread calls the fake)
                await asyncio.sleep(0.001)

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_placement, "LOOK_S", 0.0)


async def test_without_gateways_no_node_is_looked_at() -> None:
    followed = Followed(FakeCluster(HEAD), "none")
    assert await followed.first == ""
    await followed.stop()
    assert followed.cluster.num_looks == 0


async def test_only_the_head_gets_gateways_unless_all_nodes_are_to() -> None:
    cluster = FakeCluster(HEAD, SECOND)
    followed = Followed(cluster, "head")
    assert await followed.first == ""
    await followed.look()
    await followed.stop()
    assert cluster.hosts == {"head": (followed.config, "10.0.0.1:50050", "token")}
    assert followed.placement.addresses == ["10.0.0.1"]


async def test_nodes_that_join_later_get_gateways_and_nodes_that_leave_are_forgotten() -> None:
    cluster = FakeCluster(HEAD, SECOND)
    followed = Followed(cluster, "all")
    assert await followed.first == ""
    assert followed.placement.addresses == ["10.0.0.1", "10.0.0.2"]
    cluster.alive = [HEAD, THIRD]
    await followed.look()
    await followed.stop()
    assert cluster.hosts.keys() == {"head", "n3"}
    assert followed.placement.addresses == ["10.0.0.1", "10.0.0.3"]
    assert ("gateways on node 10.0.0.3 listen on port 8000", logging.INFO) in followed.said


async def test_a_failure_at_the_start_is_reported_and_tried_again() -> None:
    cluster = FakeCluster(HEAD, SECOND)
    cluster.failures["n2"] = "the port is taken"
    followed = Followed(cluster, "all")
    assert await followed.first == "On node 10.0.0.2: the port is taken"
    assert followed.placement.addresses == ["10.0.0.1"]
    cluster.failures.clear()
    await followed.look()
    await followed.stop()
    assert followed.placement.addresses == ["10.0.0.1", "10.0.0.2"]


async def test_an_unreachable_head_changes_nothing() -> None:
    cluster = FakeCluster(HEAD)
    followed = Followed(cluster, "all")
    await followed.first
    cluster.is_away = True
    await followed.look()
    cluster.is_away = False
    cluster.alive.append(SECOND)
    await followed.look()
    await followed.stop()
    assert followed.placement.addresses == ["10.0.0.1", "10.0.0.2"]


async def test_a_drained_node_gets_no_gateways_until_it_is_undrained() -> None:
    cluster = FakeCluster(HEAD, SECOND)
    followed = Followed(cluster, "all")
    await followed.first
    await followed.placement.drain("n2", 1.0)
    await followed.look()
    assert cluster.drained == ["n2"]
    assert cluster.hosts.keys() == {"head"}
    followed.placement.undrain()
    await followed.look()
    await followed.stop()
    assert cluster.hosts.keys() == {"head", "n2"}
