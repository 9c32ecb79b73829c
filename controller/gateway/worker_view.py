"""One worker as the router sees it, at one moment.

Owns: the shape. Leaves to others: the numbers (session.py), what follows from them (router.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import KW_ONLY, dataclass, field, replace
from enum import IntEnum

from lorafleet.proto import worker_pb2
from lorafleet.workers.engine.pace import Pace


class Tier(IntEnum):
    """Where a worker has an adapter; the higher, the sooner it can be used."""

    ABSENT = worker_pb2.ADAPTER_ABSENT  # the worker does not know it
    DISK = worker_pb2.ADAPTER_DISK  # registered
    HOST = worker_pb2.ADAPTER_HOST
    DEVICE = worker_pb2.ADAPTER_DEVICE  # in a slot


@dataclass(frozen=True, slots=True, eq=False)
class WorkerView:
    """What is known of a worker. num_running to host_usage: from its heartbeats."""

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
    num_prompt_tokens: int = 0  # of its requests, still to be computed
    num_pages: int = 0
    num_free_pages: int = 0
    page_size: int = 16
    pace: Pace = field(default_factory=Pace)
    tiers: Mapping[str, Tier] = field(default_factory=dict)  # by digest; those that are absent may be left out
    num_device_adapters: int = 0  # of these, those in slots
    host_usage: float = 0.0  # share of the host tier; at 1 what is read next pushes out another adapter
    expected: Set[str] = frozenset()  # adapters that requests on their way there bring into slots
    num_unreported: int = 0  # requests sent since that heartbeat, by all gateways, as far as is known
    num_unreported_tokens: int = 0  # of their prompts

    @property
    def num_requests(self) -> int:
        return self.num_running + self.num_waiting + self.num_unreported

    def tier(self, adapter: str) -> Tier:
        """Where a request that is sent now will find an adapter, or what is on its way."""
        return Tier.DEVICE if adapter in self.expected else self.tiers.get(adapter, Tier.ABSENT)

    def frozen(self) -> WorkerView:
        """The same, for another thread: what the session goes on to change is copied."""
        return replace(self, tiers=dict(self.tiers), expected=frozenset(self.expected))

    def num_in(self, tier: Tier) -> int:
        """How many adapters it has there and no nearer."""
        return sum(place is tier for place in self.tiers.values())
