"""A tensor-parallel group comes up: its ranks find each other, agree on one memory plan, and followers follow.

Rank 0 makes the engine, plans the memory and publishes the plan; the other ranks wait for it, so that all have as many
pages and slots. Whoever starts the processes need know rank, size and rank 0's address.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from lorafleet.proto.rank_pb2_grpc import add_RankServicer_to_server
from lorafleet.workers.config import EngineConfig
from lorafleet.workers.memory_plan import MemoryPlan
from lorafleet.workers.model.architecture import read_spec
from lorafleet.workers.model.device import pick_device
from lorafleet.workers.rpc import create_server
from lorafleet.workers.tp.follower import Follower
from lorafleet.workers.tp.group import Rendezvous
from lorafleet.workers.tp.plans import PlanChannel
from lorafleet.workers.tp.ranks import Ranks
from lorafleet.workers.tp.remote import RankService, RemoteFollowers

_START_TIMEOUT_S = 300.0
_PLAN = "memory plan"


class Leader:
    """Rank 0's part. The others come to where `listener` listens, which it takes over."""

    def __init__(self, config: EngineConfig, listener: socket.socket, token: str, on_lost: Callable[[], None]) -> None:
        """on_lost: called on some thread when a rank has died or its node cannot be reached."""
        self._size = config.tensor_parallel_size
        self._hidden_size = read_spec(Path(config.model)).hidden_size
        self._token = token
        self._listener = listener
        self._on_lost = on_lost

    def gather(self, plan: MemoryPlan, device: torch.device) -> Ranks:
        """A `Gather`. Raises `RuntimeError` when the other ranks do not come in time."""
        host, port = self._listener.getsockname()[:2]
        rendezvous = Rendezvous(
            host, port, rank=0, size=self._size, timeout_s=_START_TIMEOUT_S, listener=self._listener
        )
        rendezvous.put(_PLAN, json.dumps(asdict(plan)))
        group, plans = rendezvous.connect(device)
        addresses = [rendezvous.get(_address(rank)) for rank in range(1, self._size)]
        followers = RemoteFollowers(addresses, self._token, self._hidden_size, self._on_lost)
        return Ranks(group, PlanChannel(plans), followers)


async def follow(config: EngineConfig, rank: int, leader: str, host: str, token: str) -> None:
    """Be a rank above 0 until rank 0 ends. Raises `RuntimeError` when a rank is lost.

    leader: host:port where rank 0 listens. host: where rank 0 reaches this rank.
    """
    leader_host, _, port = leader.rpartition(":")
    rendezvous = await asyncio.to_thread(
        Rendezvous,
        leader_host,
        int(port),
        rank=rank,
        size=config.tensor_parallel_size,
        timeout_s=_START_TIMEOUT_S,
        listener=None,
    )
    plan = MemoryPlan(**json.loads(await asyncio.to_thread(rendezvous.get, _PLAN)))
    device = pick_device(config)
    group, plans = await asyncio.to_thread(rendezvous.connect, device)
    spec = read_spec(Path(config.model))
    follower = Follower(config, spec=spec, plan=plan, device=device, group=group, plans=PlanChannel(plans))
    server = create_server(token)
    add_RankServicer_to_server(RankService(follower, spec.hidden_size), server)
    own_port = server.add_insecure_port(f"{host}:0")
    await server.start()
    rendezvous.put(_address(rank), f"{host}:{own_port}")
    try:
        await asyncio.to_thread(follower.load)
        await asyncio.to_thread(follower.run)
    finally:
        await server.stop(grace=None)
        follower.close()


def _address(rank: int) -> str:
    return f"address of rank {rank}"
