"""A worker's report on itself as protobuf: to gateways with each heartbeat, to the controller on request.

Owns: the format. Leaves to others: the numbers (scheduling/stats.py), the timing (service.py).
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping
from typing import Final

from lorafleet.proto import worker_pb2
from lorafleet.workers.scheduling.pace import Pace
from lorafleet.workers.scheduling.stats import EngineStats

MAX_USES: Final = 1000
_PACE_FIELDS = tuple(field.name for field in dataclasses.fields(Pace))

Places = Mapping[str, worker_pb2.AdapterTier]  # by digest


def places_of(stats: EngineStats) -> Places:
    """Return the tier of each registered adapter."""
    places = dict.fromkeys(stats.registered_adapters, worker_pb2.ADAPTER_DISK)
    for digests, tier in (
        (stats.host_adapters, worker_pb2.ADAPTER_HOST),
        (stats.loading_adapters, worker_pb2.ADAPTER_HOST),
        (stats.device_adapters, worker_pb2.ADAPTER_DEVICE),
    ):
        places.update((digest, tier) for digest in digests if digest in places)
    return places


def heartbeat(
    stats: EngineStats, state: worker_pb2.WorkerState, places: Places, told: Places, num_gateways: int
) -> worker_pb2.Heartbeat:
    """Return a heartbeat with the changed tiers. told: the tiers this session has been sent so far."""
    changed = [(digest, tier) for digest, tier in places.items() if told.get(digest) != tier]
    changed += [(digest, worker_pb2.ADAPTER_ABSENT) for digest in told if digest not in places]
    return worker_pb2.Heartbeat(
        state=state,
        last_step_age_ms=int(1e3 * stats.last_step_age_s),
        load=_load(stats),
        adapters=[worker_pb2.AdapterPlace(digest=digest, tier=tier) for digest, tier in changed],
        pace=pace_to_wire(stats.pace),
        num_gateways=num_gateways,
    )


def report(
    stats: EngineStats, state: worker_pb2.WorkerState, worker_id: str, generation: int, rates: Mapping[str, float]
) -> worker_pb2.WorkerReport:
    """Return the whole report. rates: output tokens a second by digest, "" for the base model."""
    return worker_pb2.WorkerReport(
        worker_id=worker_id,
        generation=generation,
        state=state,
        load=_load(stats),
        device_adapters=stats.device_adapters,
        host_adapters=stats.host_adapters,
        num_registered_adapters=len(stats.registered_adapters),
        last_step_age_ms=int(1e3 * stats.last_step_age_s),
        counters=worker_pb2.EngineCounters(
            num_steps=stats.num_steps,
            num_prompt_tokens=stats.num_prompt_tokens,
            num_output_tokens=stats.num_output_tokens,
            num_preemptions=stats.num_preemptions,
            num_adapter_loads=stats.num_adapter_loads,
            num_slot_loads=stats.num_slot_loads,
            num_prefix_query_tokens=stats.num_prefix_query_tokens,
            num_prefix_hit_tokens=stats.num_prefix_hit_tokens,
        ),
        uses=_uses(stats, rates),
    )


def _uses(stats: EngineStats, rates: Mapping[str, float]) -> list[worker_pb2.ModelUse]:
    """Return the busiest models: those with requests first, then those with the most tokens."""
    uses = [
        worker_pb2.ModelUse(
            digest=digest,
            num_requests=stats.requests_of.get(digest, 0),
            num_output_tokens=stats.output_tokens_of.get(digest, 0),
            output_tokens_per_s=rates.get(digest, 0.0),
        )
        for digest in {**stats.requests_of, **stats.output_tokens_of}
    ]
    return heapq.nlargest(
        MAX_USES, uses, key=lambda use: (use.num_requests, use.output_tokens_per_s, use.num_output_tokens)
    )


def pace_to_wire(pace: Pace) -> worker_pb2.Pace:
    """Return the means as a message."""
    return worker_pb2.Pace(**dataclasses.asdict(pace))


def pace_from_wire(message: worker_pb2.Pace) -> Pace:
    """Return the means in a message."""
    return Pace(**{name: getattr(message, name) for name in _PACE_FIELDS})


def _load(stats: EngineStats) -> worker_pb2.Load:
    return worker_pb2.Load(
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        num_pages=stats.num_pages,
        num_free_pages=stats.num_free_pages,
        page_size=stats.page_size,
        num_uncomputed_tokens=stats.num_uncomputed_tokens,
        host_cache_usage=stats.host_cache_usage,
    )
