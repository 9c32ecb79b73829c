"""What rank 0's engine has of its tensor-parallel group. How the group comes up: start.py."""

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
    """By default, a group of one."""

    group: TensorParallelGroup = field(default_factory=TensorParallelGroup)
    plans: PlanChannel | None = None
    followers: Followers = field(default_factory=NoFollowers)


# Brings the group up for an engine with such a plan on such a device; blocks until all ranks are there.
Gather = Callable[[MemoryPlan, torch.device], Ranks]


def alone(plan: MemoryPlan, device: torch.device) -> Ranks:
    """A `Gather` for a group of one."""
    return Ranks()
