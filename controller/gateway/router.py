"""Which worker a request goes to: a pure function over what is known of each.

Owns: the policy. Leaves to others: the numbers (session.py), the table (routing_table.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

COLD_COST = 0.5  # a cold adapter with a free slot: worth half a batch of load elsewhere
EVICT_COST = 0.75  # a cold adapter that has to push another one out of its slot
QUEUE_COST = 4.0  # one batch full of waiting requests
SCARCE_PAGES = 0.05  # share of free KV pages below which preemption is near
SCARCE_COST = 0.5


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker at one moment. num_running, num_waiting and pages: from its last heartbeat."""

    worker_id: str
    ready: bool  # has a live session and takes requests
    suspect: bool  # has been silent, or its engine step hangs
    max_num_seqs: int
    max_loras: int
    num_running: int = 0
    num_waiting: int = 0
    num_unreported: int = 0  # requests sent since that heartbeat
    num_pages: int = 0
    num_free_pages: int = 0
    device_adapters: frozenset[str] = frozenset()


def choose_worker(workers: Sequence[WorkerView], adapters: Sequence[str]) -> WorkerView | None:
    """The worker with the lowest expected time to first token; None if no worker can take the request.

    adapters: digests of all that the request needs; none for the base model. A suspect worker is taken only when all
    are. Between equals a hash of (adapters, worker) decides, so that several gateways send a cold adapter to one and
    the same home.
    """
    able = [worker for worker in workers if worker.ready and worker.max_loras >= len(adapters)]
    able = [worker for worker in able if not worker.suspect] or able
    return min(able, key=lambda worker: (_cost(worker, adapters), _affinity(worker, adapters)), default=None)


def _cost(worker: WorkerView, adapters: Sequence[str]) -> float:
    """In units of a full batch's load."""
    num_requests = worker.num_running + worker.num_waiting + worker.num_unreported
    cost = num_requests / worker.max_num_seqs
    cost += QUEUE_COST * max(num_requests + 1 - worker.max_num_seqs, worker.num_waiting, 0) / worker.max_num_seqs
    if worker.num_pages and worker.num_free_pages < SCARCE_PAGES * worker.num_pages:
        cost += SCARCE_COST
    num_cold = sum(adapter not in worker.device_adapters for adapter in adapters)
    num_free = max(0, worker.max_loras - len(worker.device_adapters))
    cost += COLD_COST * min(num_cold, num_free) + EVICT_COST * max(0, num_cold - num_free)
    return cost


def _affinity(worker: WorkerView, adapters: Sequence[str]) -> bytes:
    return hashlib.blake2b(f"{'+'.join(sorted(adapters))}\0{worker.worker_id}".encode(), digest_size=8).digest()
