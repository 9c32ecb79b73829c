"""A snapshot of the engine's state, which any thread may read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorafleet.workers.scheduling.pace import Pace


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The snapshot, taken between steps. Counters count from the engine's start."""

    num_running: int = 0
    num_waiting: int = 0
    num_uncomputed_tokens: int = 0  # of all requests: of prompts, and of preempted requests' output
    page_size: int = 0
    num_pages: int = 0
    num_free_pages: int = 0
    device_adapters: tuple[str, ...] = ()  # digests in slots
    loading_adapters: tuple[str, ...] = ()  # digests on their way into slots
    host_adapters: tuple[str, ...] = ()  # digests in the host cache
    registered_adapters: tuple[str, ...] = ()  # all digests that requests may use
    host_cache_bytes: int = 0
    host_cache_usage: float = 0.0  # 1: the next read evicts another adapter
    num_steps: int = 0
    num_prompt_tokens: int = 0  # computed, recomputation after a preemption included
    num_output_tokens: int = 0
    num_preemptions: int = 0
    requests_of: Mapping[str, int] = field(default_factory=dict)  # digest ("": the base model) → unfinished requests
    output_tokens_of: Mapping[str, int] = field(default_factory=dict)  # the same keys → tokens since registration
    num_prefix_query_tokens: int = 0  # known tokens of requests at each start
    num_prefix_hit_tokens: int = 0  # of these, tokens found in the cache
    num_adapter_loads: int = 0  # disk to host
    num_slot_loads: int = 0  # host to device
    last_step_age_s: float = 0.0  # age of the running step; 0 while idle
    pace: Pace = field(default_factory=Pace)
