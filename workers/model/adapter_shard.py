"""A rank's host tier: an adapter is read whole, but of its linears only the rank's shard is kept.

Embeddings, heads and vectors are kept whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import IO

import torch

from lorafleet.workers.adapters.format import AdapterSpec, HostAdapter, LinearChange, load_adapter
from lorafleet.workers.adapters.modules import FUSED, NO_LAYER, BaseShapes
from lorafleet.workers.adapters.store import AdapterStore
from lorafleet.workers.model.architecture import ModelSpec
from lorafleet.workers.model.memory_plan import MemoryPlan
from lorafleet.workers.model.shards import LinearShard, linear_shards
from lorafleet.workers.scheduling.eviction import Eviction
from lorafleet.workers.tp.group import TensorParallelGroup


def adapter_store(
    spec: ModelSpec,
    plan: MemoryPlan,
    group: TensorParallelGroup,
    *,
    eviction: Eviction | None = None,
    need_of: Callable[[str], int] = lambda _: 0,
    read_timeout_s: float = 30.0,
    has_read: Callable[[], None] = lambda: None,
) -> AdapterStore:
    """Return a store within the plan's limits that keeps a rank's shards."""
    dtype = getattr(torch, plan.lora_dtype)
    options = {"max_bytes": plan.host_cache_bytes, "max_adapters": plan.max_cpu_loras, "dtype": dtype}
    options |= {"eviction": eviction, "need_of": need_of}
    options |= {"read_timeout_s": read_timeout_s, "has_read": has_read}
    if group.size == 1:
        return AdapterStore(spec.base_shapes, **options)
    shards = linear_shards(spec, group.rank, group.size)

    def load(
        adapter: AdapterSpec, base: BaseShapes, dtype: torch.dtype, files: Sequence[IO[bytes]] | None = None
    ) -> HostAdapter:
        return cut(load_adapter(adapter, base, dtype, files), shards, num_bytes(adapter))

    def num_bytes(adapter: AdapterSpec) -> int:
        return shard_bytes(adapter, spec.base_shapes, shards, dtype)

    return AdapterStore(spec.base_shapes, load=load, num_bytes=num_bytes, **options)


def cut(adapter: HostAdapter, shards: Mapping[str, LinearShard], num_bytes: int) -> HostAdapter:
    """Return the adapter with only a rank's part of each A and B, in new memory. num_bytes: the result's size."""
    parts: dict[tuple[int, torch.Size, int], torch.Tensor] = {}  # parts of a fused linear share one A

    def part_of(whole: torch.Tensor, columns: slice) -> torch.Tensor:
        key = whole.data_ptr(), whole.shape, columns.start
        return parts.setdefault(key, whole[:, columns])

    cuts = {
        (layer, name): (part_of(change.a_RI, shards[name].inputs), part_of(change.b_RO, shards[name].outputs))
        for (layer, name), change in adapter.weights.items()
    }
    sizes = [part.numel() for part in parts.values()]
    dtype = next((part.dtype for part in parts.values()), torch.float32)
    places = torch.empty(sum(sizes), dtype=dtype).split(sizes)
    own = {id(part): place.view(part.shape).copy_(part) for part, place in zip(parts.values(), places, strict=True)}
    weights: dict[tuple[int, str], LinearChange] = {
        key: adapter.weights[key]._replace(a_RI=own[id(a_RI)], b_RO=own[id(b_RO)]) for key, (a_RI, b_RO) in cuts.items()
    }
    return replace(adapter, weights=weights, num_bytes=num_bytes)


def shard_bytes(adapter: AdapterSpec, base: BaseShapes, shards: Mapping[str, LinearShard], dtype: torch.dtype) -> int:
    """Return the bytes of a cut adapter in host memory."""
    saved = 0
    for file in adapter.files:
        for place in file.layout.places:
            if place.layer == NO_LAYER or place.side not in ("A", "B"):
                continue
            names = FUSED.get(place.module, (place.module,))
            if place.side == "A":
                whole, kept = base.linears[names[0]][0], shards[names[0]].num_inputs
            else:
                whole = sum(base.linears[name][1] for name in names)
                kept = sum(shards[name].num_outputs for name in names)
            saved += math.prod(place.shape) // whole * (whole - kept)
    return adapter.num_bytes(dtype) - saved * dtype.itemsize
