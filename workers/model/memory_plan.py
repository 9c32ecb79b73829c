"""Division of one rank's memory, before anything is loaded. Pure arithmetic: no torch, no files.

Owns: the sizes of KV cache, adapter slots, adapters' own embeddings and heads, and host cache; the refusal of sizes
that do not fit. Leaves to others: measuring the memory (model/device.py), allocating it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorafleet.workers.adapters.vocabulary import Vocabulary
from lorafleet.workers.config import EngineConfig
from lorafleet.workers.errors import MemoryPlanError
from lorafleet.workers.model.architecture import ModelSpec
from lorafleet.workers.model.shards import linear_shards

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SCORED_AT_ONCE = 64  # prompt rows with logits at a time
_GIB = 1 << 30
_CPU_KV_BYTES = 4 * _GIB  # default limit on a CPU, where memory is shared with everything else
_HOST_CACHE_BYTES = 1 * _GIB  # default limit
# Default limit for adapters' own embeddings and heads: this many vocabulary matrices, at most this fraction of the
# budget and a quarter of what is left after everything else. It never makes a plan fail.
_NUM_TABLES = 4
_TABLE_SHARE = 16


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The memory to divide. On a CPU `host` is the device."""

    total_bytes: int
    available_bytes: int
    host_available_bytes: int
    is_cpu: bool

    def shared_by(self, ranks: int, workers: int = 1) -> DeviceMemory:
        """Return the share of one of several ranks on a host. A GPU is not shared.

        Ranks share the available memory, since they start together. Workers do not: a restarted one measures what the
        others have left.
        """
        host = self.host_available_bytes // ranks
        if self.is_cpu:
            return DeviceMemory(self.total_bytes // (ranks * workers), self.available_bytes // ranks, host, is_cpu=True)
        return replace(self, host_available_bytes=host)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """One rank's memory in bytes, and its contents."""

    budget_bytes: int  # total for the device
    weight_bytes: int
    activation_bytes: int  # workspace of the largest step, estimated
    kv_bytes: int
    num_pages: int
    page_size: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    slot_bytes: int  # one adapter slot at --max-lora-rank, with a scale and a shift of every output
    max_loras: int  # 0: LoRA is off
    full_weight_bytes: int  # limit for adapters' own embeddings and heads, in their pool
    host_cache_bytes: int
    max_cpu_loras: int | None
    dtype: str
    quantization: str | None
    lora_dtype: str
    device: str
    tensor_parallel_size: int

    def full_weight_bytes_of(self, spec: ModelSpec, vocabulary: Vocabulary) -> int:
        """Return the bytes of `full_weight_bytes` that an adapter with this vocabulary uses."""
        return vocabulary.device_bytes(
            spec.base_shapes,
            itemsize=DTYPE_BYTES[self.dtype],
            lora_itemsize=DTYPE_BYTES[self.lora_dtype],
            ranks=self.tensor_parallel_size,
        )

    @property
    def num_kv_tokens(self) -> int:
        return self.num_pages * self.page_size

    def lines(self) -> list[str]:
        """Return the plan as a table to print."""
        rows = [
            (
                "weights",
                self.weight_bytes,
                self.dtype if self.quantization is None else f"{self.quantization}, {self.dtype}",
            ),
            (
                "KV cache",
                self.kv_bytes,
                f"{self.num_pages:,} pages of {self.page_size} = {self.num_kv_tokens:,} tokens "
                f"({self.num_kv_tokens / self.max_model_len:.1f} sequences of {self.max_model_len:,})",
            ),
            ("workspace", self.activation_bytes, "largest step, estimated"),
        ]
        if self.max_loras:
            rows.append(
                (
                    "adapter slots",
                    self.slot_bytes * self.max_loras,
                    f"{self.max_loras} slots of {format_bytes(self.slot_bytes)} in {self.lora_dtype}",
                )
            )
            rows.append(("adapter embeddings", self.full_weight_bytes, "limit; filled by adapters that have their own"))
            bound = "" if self.max_cpu_loras is None else f", at most {self.max_cpu_loras} adapters"
            rows.append(("host adapter cache", self.host_cache_bytes, f"limit; filled as adapters are used{bound}"))
        head = f"memory plan ({self.device}, may use {format_bytes(self.budget_bytes)})"
        return [head] + [f"  {name:<20}{format_bytes(size):>10}  {note}" for name, size, note in rows]


def plan_memory(
    spec: ModelSpec, config: EngineConfig, memory: DeviceMemory, *, dtype: str, lora_dtype: str
) -> MemoryPlan:
    """Divide `memory`. Raises `MemoryPlanError` naming the number to change if something does not fit.

    Assumes that a worker's ranks are on one host and share its memory.
    """
    ranks = config.tensor_parallel_size
    memory = memory.shared_by(ranks, config.workers_per_host)
    budget = min(int(memory.total_bytes * config.gpu_memory_utilization), memory.available_bytes)
    max_model_len = _max_model_len(spec, config)
    shards = linear_shards(spec, 0, ranks).values()
    num_outputs = spec.num_layers * sum(shard.num_outputs for shard in shards)
    num_integers = spec.num_layers * sum(shard.num_inputs * shard.num_outputs for shard in shards)
    num_tables = 1 if spec.tie_embeddings else 2
    table = -(-spec.vocab_size // ranks) * spec.hidden_size
    weights = (num_integers + num_tables * table + spec.num_norm_elements) * DTYPE_BYTES[dtype]
    if config.quantization == "int8":
        weights += num_integers * (1 - DTYPE_BYTES[dtype]) + num_outputs * 4
    max_batched = config.batched_tokens(on_cpu=memory.is_cpu)
    activations = 4 * (
        max_batched * (4 * spec.hidden_size + 2 * spec.qkv_size + 3 * spec.intermediate_size) // ranks
        + 4 * min(max(config.max_num_seqs, SCORED_AT_ONCE), max_batched) * spec.vocab_size
    )
    slot_bytes = max_loras = host_cache = 0
    if config.lora is not None:
        max_loras = config.lora.max_loras
        features = spec.num_layers * sum(shard.num_inputs + shard.num_outputs for shard in shards)
        slot_bytes = features * config.lora.max_lora_rank * DTYPE_BYTES[lora_dtype]
        slot_bytes += num_outputs * 2 * DTYPE_BYTES["float32"]  # scale and shift
        slot_bytes += spec.num_norm_elements * DTYPE_BYTES[dtype]
        host_cache = config.lora.lora_host_cache_bytes or (
            config.lora.max_cpu_loras * slot_bytes
            if config.lora.max_cpu_loras is not None
            else max(min(_HOST_CACHE_BYTES, memory.host_available_bytes // 8), max_loras * slot_bytes)
        )
        if host_cache < max_loras * slot_bytes:
            raise MemoryPlanError(
                f"--lora-host-cache-bytes is {format_bytes(host_cache)}, less than its {max_loras} device slots of "
                f"{format_bytes(slot_bytes)}. Give at least {max_loras * slot_bytes} bytes, or lower "
                "--max-loras or --max-lora-rank."
            )
    full_weights = (config.lora.lora_full_weight_bytes or 0) if config.lora is not None else 0
    fixed = weights + activations + slot_bytes * max_loras + full_weights + (host_cache if memory.is_cpu else 0)
    if fixed > budget:
        tables = f", embeddings and heads of adapters ({format_bytes(full_weights)})" if full_weights else ""
        raise MemoryPlanError(
            f"Weights ({format_bytes(weights)}), workspace ({format_bytes(activations)}), {max_loras} adapter slots "
            f"({format_bytes(slot_bytes * max_loras)}){tables} and host cache ({format_bytes(host_cache)}) need "
            f"{format_bytes(fixed)}; {format_bytes(budget)} may be used ({format_bytes(memory.available_bytes)} "
            f"available, --gpu-memory-utilization {config.gpu_memory_utilization}). Lower --max-loras, "
            f"--max-lora-rank, --max-cpu-loras{', --lora-full-weight-bytes' if tables else ''} or "
            "--max-num-batched-tokens, or use a smaller model."
        )
    if not memory.is_cpu and host_cache > memory.host_available_bytes:
        raise MemoryPlanError(
            f"The host adapter cache of {format_bytes(host_cache)} is more than the "
            f"{format_bytes(memory.host_available_bytes)} of host memory available. Lower --max-cpu-loras or "
            "--lora-host-cache-bytes."
        )
    page_bytes = spec.kv_elements_per_token(ranks) * DTYPE_BYTES[dtype] * config.block_size
    pages_of_one = -(-max_model_len // config.block_size)
    needed = pages_of_one * page_bytes
    kv_bytes = config.kv_cache_memory_bytes
    if config.lora is not None and config.lora.lora_full_weight_bytes is None:
        left = max(0, budget - fixed - max(needed, kv_bytes or 0))
        full_weights = min(_NUM_TABLES * table * DTYPE_BYTES[dtype], budget // _TABLE_SHARE, left // 4)
        fixed += full_weights
    room = budget - fixed
    if needed > room:
        raise MemoryPlanError(
            f"--max-model-len {max_model_len} needs {format_bytes(needed)} of KV cache for one sequence; "
            f"{format_bytes(room)} is left after weights, workspace and adapters. "
            + _shorter(room // page_bytes * config.block_size)
            + "lower --max-loras, --max-lora-rank, --max-cpu-loras or --max-num-batched-tokens."
        )
    if kv_bytes is not None and kv_bytes > room:
        raise MemoryPlanError(
            f"--kv-cache-memory-bytes is {format_bytes(kv_bytes)}; {format_bytes(room)} is left after weights, "
            f"workspace and adapters. Give at most {room} bytes, or lower --max-loras or --max-cpu-loras."
        )
    if kv_bytes is None:
        useful = config.max_num_seqs * pages_of_one * page_bytes
        kv_bytes = min(room, useful)
        if memory.is_cpu:
            kv_bytes = min(kv_bytes, max(min(_CPU_KV_BYTES, room // 2), pages_of_one * page_bytes))
    num_pages = kv_bytes // page_bytes
    if num_pages < pages_of_one:
        raise MemoryPlanError(
            f"--max-model-len {max_model_len} needs {format_bytes(needed)} of KV cache for one sequence; "
            f"--kv-cache-memory-bytes is {format_bytes(kv_bytes)}. "
            + _shorter(num_pages * config.block_size)
            + f"raise --kv-cache-memory-bytes to {needed}."
        )
    return MemoryPlan(
        budget_bytes=budget,
        weight_bytes=weights,
        activation_bytes=activations,
        kv_bytes=num_pages * page_bytes,
        num_pages=num_pages,
        page_size=config.block_size,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_batched,
        max_num_seqs=config.max_num_seqs,
        slot_bytes=slot_bytes,
        max_loras=max_loras,
        full_weight_bytes=full_weights,
        host_cache_bytes=host_cache,
        max_cpu_loras=None if config.lora is None else config.lora.max_cpu_loras,
        dtype=dtype,
        quantization=config.quantization,
        lora_dtype=lora_dtype,
        device="cpu" if memory.is_cpu else "cuda",
        tensor_parallel_size=ranks,
    )


def _shorter(num_tokens: int) -> str:
    """Return the first half of the advice, which depends on whether the cache holds a page at all."""
    return f"Lower --max-model-len to {num_tokens}, or " if num_tokens else "It holds no page: "


def _max_model_len(spec: ModelSpec, config: EngineConfig) -> int:
    config.check_context(spec.max_position, spec.architecture)
    return config.max_model_len or spec.max_position


def format_bytes(size: int) -> str:
    """Format a size: '1.5 GiB', '3 MiB'."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            number = size / scale
            return f"{number:.3g} {unit}" if number < 999.5 else f"{number:.0f} {unit}"
    return f"{size} B"
