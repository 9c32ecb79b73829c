"""The router's view of one worker, at one moment.

Owns: the shape. Leaves to others: the numbers (streams/session.py), the choice (router.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import KW_ONLY, dataclass, field, replace
from enum import IntEnum

from lorafleet.proto import worker_pb2
from lorafleet.workers.scheduling.pace import Pace


class Tier(IntEnum):
    """The place of an adapter on a worker; the higher, the sooner it can be used."""

    ABSENT = worker_pb2.ADAPTER_ABSENT  # the worker does not know it
    DISK = worker_pb2.ADAPTER_DISK  # registered
    HOST = worker_pb2.ADAPTER_HOST
    DEVICE = worker_pb2.ADAPTER_DEVICE  # in a slot


@dataclass(frozen=True, slots=True, eq=False)
class WorkerView:
    """The state of one worker, as far as this gateway knows. num_running to host_usage: from its heartbeats."""

    worker_id: str
    ready: bool  # has a live session and takes requests
    suspect: bool  # has been silent, or its engine step hangs
    max_num_seqs: int
    max_loras: int
    _: KW_ONLY
    generation: int = 0
    num_ranks: int = 1
    num_running: int = 0
    num_waiting: int = 0
    num_prompt_tokens: int = 0  # its requests' prompt tokens that are still to be computed
    num_pages: int = 0
    num_free_pages: int = 0
    page_size: int = 16
    pace: Pace = field(default_factory=Pace)
    tiers: Mapping[str, Tier] = field(default_factory=dict)  # by digest; absent ones may be left out
    num_device_adapters: int = 0  # of these, those in slots
    host_usage: float = 0.0  # share of the host tier in use; at 1 the next read evicts another adapter
    expected: Set[str] = frozenset()  # adapters that requests sent there bring into slots
    num_unreported: int = 0  # requests sent since that heartbeat, by all gateways, as far as is known
    num_unreported_tokens: int = 0  # their prompt tokens

    @property
    def num_requests(self) -> int:
        return self.num_running + self.num_waiting + self.num_unreported

    def tier(self, adapter: str) -> Tier:
        """Return the tier in which a request sent now will find an adapter, or its load in progress."""
        return Tier.DEVICE if adapter in self.expected else self.tiers.get(adapter, Tier.ABSENT)

    def frozen(self) -> WorkerView:
        """Return a copy for another thread, without the containers that the session keeps changing."""
        return replace(self, tiers=dict(self.tiers), expected=frozenset(self.expected))

    def num_in(self, tier: Tier) -> int:
        """Return how many adapters have this as their fastest tier."""
        return sum(place is tier for place in self.tiers.values())
