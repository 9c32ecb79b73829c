"""Chooses the worker for a request: a pure function of the state of each.

A request goes to the worker with the lowest expected time to first token. That time is the sum of: the wait for a seat
and KV pages, if none are free (a request holds its seat for `seat_s`, so one comes free every `seat_s / max_num_seqs`);
the computing of the prompts before it and of its own, less its cached prefix (prefix affinity); and one step. Its
adapter is loaded meanwhile, so the load counts only where it takes longer than the waits.

Three costs to other requests are added. A request slows all that run on the same worker. An adapter read on one more
worker evicts another one there, which will be read again: the fuller the host tier, the more likely. So an adapter
stays where it is until waiting there costs more than both reads. If an adapter is hot, many more requests for it would
wait before another worker has it, and they share the cost of reading it; so it gets a second home early.

Each worker measures its own times. A time it has not measured recently is taken from the other workers.

A worker whose queue exceeds a quarter of its seats, and whose load exceeds 5/4 of the mean, gets no requests while
others can take them, so affinity never overloads a worker.

Owns: the policy. Leaves to others: the numbers (worker_view.py, prefix_memory.py).
"""

from __future__ import annotations

import functools
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from lorafleet.controller.gateway.routing.worker_view import Tier, WorkerView
from lorafleet.workers.scheduling.pace import Pace

LOAD_BOUND = 1.25  # requests per seat, or times the mean of all workers if that is higher
EVICTED_COUNTS = 2.0  # cost, in reads, of the adapter that a read evicts from a full host tier
REPLACED_COUNTS = 0.5  # cost, in loads, of the adapter whose slot is taken
HOME_SHARE = 0.25  # discount, in reads, that draws an adapter that no worker has to its home
FULL_SHARE = 0.9  # share of the seats that counts: the last ones are taken before a heartbeat shows it
FORESIGHT = 4.0  # in reads: the time over which further requests for a hot adapter are counted
SCARCE_PAGES = 0.05  # share of free KV pages below which preemption is likely
# Used while no worker has measured it.
TYPICAL_PACE = Pace(step_s=0.03, prompt_token_s=0.0005, seat_s=3.0, host_load_s=0.02, disk_load_s=0.3)
_PACE_NAMES = tuple(field.name for field in fields(Pace))


@dataclass(frozen=True, slots=True)
class Wanted:
    """The properties of a request that the choice depends on."""

    adapters: tuple[str, ...] = ()  # digests of all it needs; none: the base model
    num_prompt_tokens: int = 0
    num_recent: float = 0.0  # requests for the same adapters in the last second
    num_cached: Mapping[str, int] = field(default_factory=dict)  # worker id → tokens cached there


def choose_worker(workers: Sequence[WorkerView], wanted: Wanted, *, lot: str = "") -> WorkerView | None:
    """Return the worker where the request costs least; None if no worker can take it.

    A suspect worker is chosen only if all are suspect. lot: breaks ties of requests without adapters; each gateway has
    its own, so that they do not all choose the same worker.
    """
    able = [worker for worker in workers if worker.ready and worker.max_loras >= len(wanted.adapters)]
    able = [worker for worker in able if not worker.suspect] or able
    if len(able) < 2:
        return able[0] if able else None
    able = _within_bound(able)
    key = "+".join(sorted(wanted.adapters)) or lot
    lots = {worker.worker_id: _draw(key, worker.worker_id) for worker in able}
    num_homes = sum(all(worker.tier(adapter) >= Tier.HOST for adapter in wanted.adapters) for worker in able)
    home = max(lots, key=lots.__getitem__) if wanted.adapters else ""
    costs = (
        (_cost_s(worker, pace, wanted, worker.worker_id == home, num_homes), lots[worker.worker_id], number)
        for number, (worker, pace) in enumerate(zip(able, complete_paces(able), strict=True))
    )
    return able[min(costs)[2]]


def complete_paces(workers: Sequence[WorkerView]) -> list[Pace]:
    """Return each worker's pace; a time it has not measured recently is the others' median, or typical."""
    paces = [worker.pace for worker in workers]
    for name in _PACE_NAMES:
        known = [seconds for pace in paces if (seconds := getattr(pace, name))]
        if len(known) < len(paces):
            usual = {name: statistics.median(known) if known else getattr(TYPICAL_PACE, name)}
            paces = [pace if getattr(pace, name) else replace(pace, **usual) for pace in paces]
    return paces


def expected_first_token_s(worker: WorkerView, pace: Pace, wanted: Wanted, num_coming: float = 0.0) -> float:
    """Return the time from now to the request's first token on this worker. num_coming: further requests expected."""
    wait_s = (worker.num_prompt_tokens + worker.num_unreported_tokens) * pace.prompt_token_s
    num_ahead = worker.num_requests + 1 - FULL_SHARE * worker.max_num_seqs + num_coming
    if num_ahead > 0:
        wait_s += num_ahead * pace.seat_s / worker.max_num_seqs
    num_tokens = max(1, wanted.num_prompt_tokens - wanted.num_cached.get(worker.worker_id, 0))
    if worker.num_pages:
        num_lacking = num_tokens // worker.page_size + 1 + SCARCE_PAGES * worker.num_pages - worker.num_free_pages
        if num_lacking > 0:
            wait_s += num_lacking * pace.seat_s / worker.num_pages
    load_s = max((_load_s(worker, pace, adapter) for adapter in wanted.adapters), default=0.0)
    return max(wait_s, load_s) + pace.step_s + num_tokens * pace.prompt_token_s


def _cost_s(worker: WorkerView, pace: Pace, wanted: Wanted, is_home: bool, num_homes: int) -> float:
    num_coming = 0.0
    if wanted.adapters and all(worker.tier(adapter) >= Tier.HOST for adapter in wanted.adapters):
        num_coming = FORESIGHT * wanted.num_recent * pace.disk_load_s / num_homes
    cost_s = expected_first_token_s(worker, pace, wanted, num_coming)
    cost_s += pace.step_s * worker.num_requests / worker.max_num_seqs
    num_cold = 0
    for adapter in wanted.adapters:
        tier = worker.tier(adapter)
        num_cold += tier < Tier.DEVICE
        if tier < Tier.HOST:
            evicted = EVICTED_COUNTS * worker.host_usage / (1.0 + wanted.num_recent)
            cost_s += (evicted - HOME_SHARE * is_home) * pace.disk_load_s
    if num_cold:
        num_evicted = max(0, num_cold + worker.num_device_adapters - worker.max_loras)
        cost_s += REPLACED_COUNTS * pace.host_load_s * num_evicted
    return cost_s


def _load_s(worker: WorkerView, pace: Pace, adapter: str) -> float:
    tier = worker.tier(adapter)
    if tier is Tier.DEVICE:
        return 0.0
    if tier is Tier.HOST:
        return pace.host_load_s
    return pace.disk_load_s if tier is Tier.DISK else 2.0 * pace.disk_load_s


def _within_bound(workers: list[WorkerView]) -> list[WorkerView]:
    """Return the workers that would not be overloaded, at least one."""
    num_seats = sum(worker.max_num_seqs for worker in workers)
    mean = (sum(worker.num_requests for worker in workers) + 1) / num_seats
    bound = LOAD_BOUND * max(1.0, mean)
    return [worker for worker in workers if worker.num_requests < bound * worker.max_num_seqs]


def _draw(key: str, worker_id: str) -> int:
    """Return a pseudo-random number that is the same in all gateways (rendezvous hashing)."""
    mixed = (_hash(key) ^ _hash(worker_id)) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF


@functools.lru_cache(maxsize=1 << 16)
def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
