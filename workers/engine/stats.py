"""What the engine says about itself: a snapshot that any thread may read."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorafleet.workers.engine.pace import Pace


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Taken between steps. Counters count from the engine's start."""

    num_running: int = 0
    num_waiting: int = 0
    num_uncomputed_tokens: int = 0  # of prompts and of what preempted requests had, of all requests
    page_size: int = 0
    num_pages: int = 0
    num_free_pages: int = 0
    device_adapters: tuple[str, ...] = ()  # digests in slots
    loading_adapters: tuple[str, ...] = ()  # digests on their way into slots
    host_adapters: tuple[str, ...] = ()  # digests in the host cache
    registered_adapters: tuple[str, ...] = ()  # all digests that requests may name
    host_cache_bytes: int = 0
    host_cache_usage: float = 0.0  # 1: what is read next pushes out another one
    num_steps: int = 0
    num_prompt_tokens: int = 0  # computed, recomputation after a preemption included
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_prefix_query_tokens: int = 0  # known when requests started, for the first time or again
    num_prefix_hit_tokens: int = 0  # of these, those that were found and not computed
    num_adapter_loads: int = 0  # disk to host
    num_slot_loads: int = 0  # host to device
    last_step_age_s: float = 0.0  # since the running step began; 0 while idle
    pace: Pace = field(default_factory=Pace)
