"""The tensor-parallel group as the layers see it: a rank, a size and two collectives; and where its ranks meet.

Passed as an argument to whatever is sharded; nothing reads a global, torch.distributed's default group included. With
size 1 every collective is the identity.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lorafleet.workers.address import own_address

# Of a collective: ranks wait for the next step for as long as nobody asks for one. A rank that dies is noticed at once.
_PATIENCE = timedelta(days=365)
_c10d: Any = dist  # whose type stubs leave out half of what it has


@dataclass(frozen=True, slots=True)
class TensorParallelGroup:
    """`process_group` is a torch.distributed group of `size` ranks; None with size 1."""

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if self.process_group is not None:
            self.process_group.allreduce([tensor]).wait()
        return tensor

    def all_gather_columns(self, tensor_TV: torch.Tensor) -> torch.Tensor:
        """[T, V / size] of each rank → [T, V], in rank order."""
        if self.process_group is None:
            return tensor_TV
        shards = [torch.empty_like(tensor_TV) for _ in range(self.size)]
        self.process_group.allgather([shards], [tensor_TV.contiguous()]).wait()
        return torch.cat(shards, dim=1)


class Rendezvous:
    """Where the ranks of one group meet: a key-value store in rank 0's process, on its node's address."""

    def __init__(
        self, host: str, port: int, *, rank: int, size: int, timeout_s: float, listener: socket.socket | None
    ) -> None:
        """listener: rank 0's, bound to (host, port); the store takes it over. Raises `RuntimeError` after that time."""
        self.rank = rank
        self.size = size
        self._host = host
        self._store = _c10d.TCPStore(
            host,
            port,
            world_size=size,
            is_master=listener is not None,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=None if listener is None else listener.detach(),
        )

    def put(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> str:
        """Waits until some rank has put it. Raises `RuntimeError` when none does in time."""
        return str(self._store.get(key).decode())

    def connect(self, device: torch.device) -> tuple[TensorParallelGroup, dist.ProcessGroup]:
        """The group of the device's tensors, and one for plans, which are on the host. All ranks call it at once."""
        plans = self._gloo("plans")
        if device.type != "cuda":
            return TensorParallelGroup(self.rank, self.size, self._gloo("tensors")), plans
        options = _c10d.ProcessGroupNCCL.Options()
        tensors = _c10d.ProcessGroupNCCL(_c10d.PrefixStore("tensors", self._store), self.rank, self.size, options)
        return TensorParallelGroup(self.rank, self.size, tensors), plans

    def _gloo(self, name: str) -> dist.ProcessGroup:
        options = _c10d.ProcessGroupGloo._Options()
        options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=own_address(self._host))]
        options._timeout = _PATIENCE
        group: dist.ProcessGroup = _c10d.ProcessGroupGloo(
            _c10d.PrefixStore(name, self._store), self.rank, self.size, options
        )
        return group
