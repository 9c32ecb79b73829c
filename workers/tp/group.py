"""The tensor-parallel group as the layers see it: a rank, a size and two collectives.

Passed as an argument to whatever is sharded; nothing reads a global. With size 1 every collective is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class TensorParallelGroup:
    """`process_group` is a torch.distributed group of `size` ranks; None with size 1."""

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def all_gather_columns(self, tensor_TV: torch.Tensor) -> torch.Tensor:
        """[T, V / size] of each rank → [T, V], in rank order."""
        if self.size == 1:
            return tensor_TV
        shards = [torch.empty_like(tensor_TV) for _ in range(self.size)]
        dist.all_gather(shards, tensor_TV.contiguous(), group=self.process_group)
        return torch.cat(shards, dim=1)

    def shard(self, size: int, what: str) -> tuple[int, int]:
        """This rank's [start, stop) of a dimension that the group size divides. Raises ValueError if it does not."""
        if size % self.size:
            raise ValueError(f"{what} is {size}, which {self.size} ranks do not divide.")
        part = size // self.size
        return self.rank * part, (self.rank + 1) * part
