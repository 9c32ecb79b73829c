"""Rank 0's tensor-parallel group as its engine sees it. For how the group starts see start.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lorafleet.workers.model.memory_plan import MemoryPlan
from lorafleet.workers.ranks.followers import Followers, NoFollowers
from lorafleet.workers.tp.group import TensorParallelGroup
from lorafleet.workers.tp.plans import PlanChannel


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of one group; by default, a group of one."""

    group: TensorParallelGroup = field(default_factory=TensorParallelGroup)
    plans: PlanChannel | None = None
    followers: Followers = field(default_factory=NoFollowers)


# Forms the group for an engine with this plan on this device; blocks until all ranks have joined.
Gather = Callable[[MemoryPlan, torch.device], Ranks]


def alone(plan: MemoryPlan, device: torch.device) -> Ranks:
    """Return a group of one, as a `Gather`."""
    return Ranks()
