"""The configuration of an engine: built and validated once (by the CLI or `LLM`), frozen, passed whole.

Owns: the fields, their defaults, and the checks that need nothing else. Leaves to others: checks against the model
(model/architecture.py) and against memory (model/memory_plan.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from lorafleet.workers.cores import num_usable_cores, share
from lorafleet.workers.errors import ConfigError
from lorafleet.workers.scheduling.eviction import EVICTIONS
from lorafleet.workers.scheduling.request import MAX_WEIGHT, MIN_WEIGHT

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
QUANTIZATIONS = ("int8",)


@dataclass(frozen=True, slots=True)
class LoRAModule:
    """An adapter served from the start: `--lora-modules name=path`."""

    name: str
    path: str
    base_model_name: str | None = None  # shown as `parent` in /v1/models
    weight: float = 1.0  # share of service among a tenant's adapters
    pin: bool = False  # keep it in a device slot

    def __post_init__(self) -> None:
        if not MIN_WEIGHT <= self.weight <= MAX_WEIGHT:  # false for NaN too
            raise ConfigError(
                f"The weight of adapter {self.name!r} is {self.weight}; it must be {MIN_WEIGHT:g} to {MAX_WEIGHT:g}."
            )


@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """Limits of adapter serving, named as in vLLM."""

    max_loras: int = 8  # adapters in one batch = device slots; the base model uses none
    max_lora_rank: int = 16
    max_cpu_loras: int | None = None  # adapters in the host cache; None: bounded by bytes alone
    host_cache_bytes: int | None = None  # None: the memory plan's default
    lora_dtype: str = "auto"  # auto: the model's
    eviction: str = "lru"  # the eviction policy: lru, or cost (GreedyDual-Size-Frequency)
    extra_vocab_size: int = 256  # token ids an adapter may add to the model's
    full_weight_bytes: int | None = None  # pool for adapters' embeddings and heads; None: the memory plan's default

    def __post_init__(self) -> None:
        _at_least("--max-loras", self.max_loras, 1)
        _at_least("--max-lora-rank", self.max_lora_rank, 1)
        if self.max_lora_rank > 512:
            raise ConfigError(f"--max-lora-rank is {self.max_lora_rank}; the limit is 512.")
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ConfigError(
                f"--max-cpu-loras is {self.max_cpu_loras}, less than --max-loras {self.max_loras}: the host cache "
                "backs the device slots. Raise --max-cpu-loras or lower --max-loras."
            )
        if self.host_cache_bytes is not None:
            _at_least("--lora-host-cache-bytes", self.host_cache_bytes, 1)
        _at_least("--lora-extra-vocab-size", self.extra_vocab_size, 0)
        if self.full_weight_bytes is not None:
            _at_least("--lora-full-weight-bytes", self.full_weight_bytes, 0)
        _one_of("--lora-dtype", self.lora_dtype, DTYPES)
        _one_of("--lora-eviction", self.eviction, EVICTIONS)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine: its model, limits and device. `None` means: derived from the model or the memory plan."""

    model: str  # a local directory with safetensors and tokenizer.json (sources/models.py resolves ids and GGUF files)
    dtype: str = "auto"  # auto: the checkpoint's; float16 becomes bfloat16 on a CPU, int8 weights go with bfloat16
    quantization: str | None = None  # int8: the decoder's linears as 8-bit integers with a scale per output
    device: str = "auto"
    max_model_len: int | None = None  # tokens of prompt and output together
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None  # tokens computed per step; None: 512 on a CPU, 2048 on CUDA
    block_size: int = 16  # tokens per KV page
    enable_prefix_caching: bool = True  # reuse prefixes computed for the same tenant and adapter
    enforce_eager: bool = False  # launch steps op by op; never replay captured graphs
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9  # of the device's memory; on a CPU, of the machine's (or the container's)
    tensor_parallel_size: int = 1
    max_waiting: int | None = 4096  # requests queued besides the running ones; more get 429; None: no limit
    # Maximum time a flow (a tenant's requests for one adapter) goes without a token while others get some; 0: no limit.
    max_adapter_wait_s: float = 60.0
    # A read of an adapter that takes longer is abandoned, so that others continue; large files get 1 s more per 10 MiB.
    adapter_read_timeout_s: float = 30.0
    lora: LoRAConfig | None = None  # None: LoRA is off
    num_threads: int | None = None  # CPU threads of each rank; None: its share of the cores this process may use
    workers_per_host: int = 1  # workers on this host, this one included; filled in by the launcher

    def __post_init__(self) -> None:
        _one_of("--dtype", self.dtype, DTYPES)
        _one_of("--device", self.device, DEVICES)
        if self.quantization is not None:
            _one_of("--quantization", self.quantization, QUANTIZATIONS)
            if self.dtype not in ("auto", "bfloat16"):
                raise ConfigError(
                    f"--quantization {self.quantization} computes in bfloat16, but --dtype is {self.dtype}. Leave "
                    "--dtype out, or leave out --quantization."
                )
        if self.max_model_len is not None:
            _at_least("--max-model-len", self.max_model_len, 1)
        _at_least("--max-num-seqs", self.max_num_seqs, 1)
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens is {self.max_num_batched_tokens}, less than --max-num-seqs "
                f"{self.max_num_seqs}: every running sequence needs a token a step. Raise one or lower the other."
            )
        if self.block_size not in (8, 16, 32, 64, 128):
            raise ConfigError(f"--block-size is {self.block_size}; it must be one of 8, 16, 32, 64, 128.")
        if self.kv_cache_memory_bytes is not None:
            _at_least("--kv-cache-memory-bytes", self.kv_cache_memory_bytes, 1)
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"--gpu-memory-utilization is {self.gpu_memory_utilization}; it must be in (0, 1].")
        _at_least("--tensor-parallel-size", self.tensor_parallel_size, 1)
        if self.max_waiting is not None:
            _at_least("--max-waiting", self.max_waiting, 1)
        if self.max_adapter_wait_s and not 1.0 <= self.max_adapter_wait_s <= 86400.0:  # true for NaN
            raise ConfigError(
                f"--max-adapter-wait-s is {self.max_adapter_wait_s:g}; it must be between 1 and 86400, or 0 for no "
                "limit."
            )
        if not 0.1 <= self.adapter_read_timeout_s <= 86400.0:  # true for NaN
            raise ConfigError(
                f"--adapter-read-timeout-s is {self.adapter_read_timeout_s:g}; it must be between 0.1 and 86400."
            )
        _at_least("workers_per_host", self.workers_per_host, 1)
        if self.num_threads is not None:
            _at_least("--num-threads", self.num_threads, 1)

    def batched_tokens(self, *, on_cpu: bool) -> int:
        """`max_num_batched_tokens` or its default, which is small on a CPU: there a long step delays every request."""
        return self.max_num_batched_tokens or max(512 if on_cpu else 2048, self.max_num_seqs)

    @property
    def ranks_per_host(self) -> int:
        """Ranks that share this host's cores, this one included."""
        return self.tensor_parallel_size * self.workers_per_host

    @property
    def threads(self) -> int:
        return self.num_threads or share(num_usable_cores(), self.ranks_per_host)


def _at_least(flag: str, value: int, bound: int) -> None:
    if value < bound:
        raise ConfigError(f"{flag} is {value}; it must be at least {bound}.")


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{flag} is {value!r}; it must be one of {', '.join(allowed)}.")
