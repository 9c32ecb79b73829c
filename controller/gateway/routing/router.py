"""Which worker a request goes to: a pure function over what is known of each.

A request goes where its first token is to be expected first. What that takes, in seconds, on a worker: a seat and KV
pages, if it has none left (its requests hold theirs for `seat_s`, so one comes free every `seat_s / max_num_seqs`); the
prompts before it and its own, less what of its own the worker has computed for another request (prefix affinity); the
way of its adapter into a slot, which goes on while it waits for the rest; a step.

Three things are added that others pay for. A request slows all that run beside it. An adapter that is read on one more
worker pushes out another one there, which will be read again: the fuller the host tier, the more likely. So an adapter
stays where it is until waiting there costs more than both reads. And where an adapter is hot, many more requests for it
will wait before another worker has it, and share what its reading costs; so it gets a second home early.

How long things take, each worker measures. What one has not measured of late is taken to be as with the others.

Workers with a queue of over a quarter of their seats, and over 5/4 of the mean load, take nothing while others can: no
affinity overloads a worker.

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

LOAD_BOUND = 1.25  # requests a seat, or of the mean of all workers where that is more
EVICTED_COUNTS = 2.0  # of a read, for the adapter that one which is read pushes out of a full host tier
REPLACED_COUNTS = 0.5  # of a load, for the adapter whose slot is taken
HOME_SHARE = 0.25  # of a read, by which an adapter that nobody has is drawn to its home
FULL_SHARE = 0.9  # of the seats: the last ones are taken before a heartbeat says so
FORESIGHT = 4.0  # in lengths of a read: for so long the requests to come for a hot adapter are reckoned with
SCARCE_PAGES = 0.05  # share of free KV pages below which requests are likely to be preempted
# While no worker has measured it.
TYPICAL_PACE = Pace(step_s=0.03, prompt_token_s=0.0005, seat_s=3.0, host_load_s=0.02, disk_load_s=0.3)
_PACE_NAMES = tuple(field.name for field in fields(Pace))


@dataclass(frozen=True, slots=True)
class Wanted:
    """What matters of a request."""

    adapters: tuple[str, ...] = ()  # digests of all that it needs; none: the base model
    num_prompt_tokens: int = 0
    num_recent: float = 0.0  # requests of the last second for the same adapters
    num_cached: Mapping[str, int] = field(default_factory=dict)  # worker ids → tokens that are computed there


def choose_worker(workers: Sequence[WorkerView], wanted: Wanted, *, lot: str = "") -> WorkerView | None:
    """The worker where the request costs least; None if no worker can take it.

    A suspect worker is taken only when all are. lot: decides between equals that have no adapter to decide for them;
    gateways that each have their own do not all take the same worker.
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
    """Each worker's pace; what it has not measured of late is the median of those that have, or typical."""
    paces = [worker.pace for worker in workers]
    for name in _PACE_NAMES:
        known = [seconds for pace in paces if (seconds := getattr(pace, name))]
        if len(known) < len(paces):
            usual = {name: statistics.median(known) if known else getattr(TYPICAL_PACE, name)}
            paces = [pace if getattr(pace, name) else replace(pace, **usual) for pace in paces]
    return paces


def expected_first_token_s(worker: WorkerView, pace: Pace, wanted: Wanted, num_coming: float = 0.0) -> float:
    """From now to the request's first token on this worker. num_coming: more requests to reckon with."""
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
    """Without those that would be overloaded; there is always one left."""
    num_seats = sum(worker.max_num_seqs for worker in workers)
    mean = (sum(worker.num_requests for worker in workers) + 1) / num_seats
    bound = LOAD_BOUND * max(1.0, mean)
    return [worker for worker in workers if worker.num_requests < bound * worker.max_num_seqs]


def _draw(key: str, worker_id: str) -> int:
    """A number that looks drawn by lot and is the same in all gateways (rendezvous hashing)."""
    mixed = (_hash(key) ^ _hash(worker_id)) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF


@functools.lru_cache(maxsize=1 << 16)
def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
