"""The benchmarks' workloads: the same requests for every server and for the engine alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload: `concurrency` requests are open at once until `num_requests` are done."""

    name: str
    num_requests: int
    concurrency: int
    num_input_tokens: int
    num_output_tokens: int
    num_adapters: int  # 0: the base model


@dataclass(frozen=True, slots=True)
class BenchRequest:
    prompt_token_ids: tuple[int, ...]
    adapter: str | None  # a name; None is the base model


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("base", 32, 32, 128, 64, 0),
        Workload("adapters-1", 32, 32, 128, 64, 1),
        Workload("adapters-4", 32, 32, 128, 64, 4),
        Workload("adapters-16", 32, 32, 128, 64, 16),
        Workload("adapters-64", 64, 64, 128, 64, 64),
        Workload("single", 5, 1, 128, 128, 0),
        Workload("single-adapter", 5, 1, 128, 128, 1),
        Workload("long", 8, 8, 1500, 8, 0),
        Workload("long-adapters-4", 8, 8, 1500, 8, 4),
    )
}


def make_requests(workload: Workload, adapters: Sequence[str], *, vocab_size: int, seed: int = 0) -> list[BenchRequest]:
    """Return requests with random prompts, which depend on workload and seed, and adapters in turn.

    Raises ValueError if there are fewer adapters than the workload needs.
    """
    if len(adapters) < workload.num_adapters:
        raise ValueError(f"{workload.name} needs {workload.num_adapters} adapters, there are {len(adapters)}.")
    rng = random.Random(f"{workload.name} {seed}")
    low = min(100, vocab_size // 2)  # above the special tokens of all known vocabularies
    return [
        BenchRequest(
            tuple(rng.randrange(low, vocab_size) for _ in range(workload.num_input_tokens)),
            adapters[i % workload.num_adapters] if workload.num_adapters else None,
        )
        for i in range(workload.num_requests)
    ]
