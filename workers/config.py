"""The configuration of an engine: built and validated once (by the CLI or `LLM`), frozen, passed whole.

Owns: the options, their defaults and their checks that need nothing but themselves. Leaves to others: checks against
the model (model/architecture.py) and against memory (model/memory_plan.py), how an option is declared (options.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from lorafleet.workers.cores import num_usable_cores, share
from lorafleet.workers.errors import ConfigError, MemoryPlanError, quoted
from lorafleet.workers.options import DAY_S, MAX_BYTES, check_options, option
from lorafleet.workers.scheduling.eviction import EVICTIONS
from lorafleet.workers.scheduling.request import ADAPTER_NAME, MAX_WEIGHT, MIN_WEIGHT, is_adapter_name

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
QUANTIZATIONS = ("int8",)
BLOCK_SIZES = (8, 16, 32, 64, 128)

# Titles that commands list options under.
MODEL, BATCHING, LORA = "model", "batching and memory", "LoRA"


@dataclass(frozen=True, slots=True)
class LoRAModule:
    """An adapter served from the start: `--lora-modules name=path`."""

    name: str
    path: str
    base_model_name: str | None = None  # shown as `parent` in /v1/models
    weight: float = 1.0  # share of service among a tenant's adapters
    pin: bool = False  # keep it in a device slot

    def __post_init__(self) -> None:
        if not is_adapter_name(self.name):
            raise ConfigError(f"The adapter name {quoted(self.name)} is not {ADAPTER_NAME}.")
        if not MIN_WEIGHT <= self.weight <= MAX_WEIGHT:  # false for NaN too
            raise ConfigError(
                f"The weight of adapter {self.name!r} is {self.weight}; it must be {MIN_WEIGHT:g} to {MAX_WEIGHT:g}."
            )


@dataclass(frozen=True)  # no slots, since `EngineArgs` has two bases
class LoRAConfig:
    """Limits of adapter serving, named as in vLLM."""

    max_loras: int = option(
        8,
        group=LORA,
        minimum=1,
        maximum=100_000,
        help="adapters in one batch, each in a device slot; more adapters take turns",
    )
    max_lora_rank: int = option(16, group=LORA, minimum=1, maximum=512, help="largest adapter rank that a slot holds")
    max_cpu_loras: int | None = option(
        None,
        group=LORA,
        minimum=1,
        maximum=10_000_000,
        help="adapters in the host adapter cache, at least --max-loras",
        default_text="bounded by bytes",
    )
    lora_host_cache_bytes: int | None = option(
        None,
        group=LORA,
        minimum=1,
        maximum=MAX_BYTES,
        help="size of the host adapter cache",
        default_text="at most 1GiB and an eighth of the free memory",
    )
    lora_dtype: str = option("auto", group=LORA, choices=DTYPES, help="dtype of adapter weights; auto: the model's")
    lora_eviction: str = option(
        "lru",
        group=LORA,
        choices=EVICTIONS,
        help="adapter that makes room for another: the least recently used (lru), or the cheapest to reload by size, "
        "reload time, recency and frequency (cost)",
    )
    lora_extra_vocab_size: int = option(
        256, group=LORA, minimum=0, maximum=1_000_000, help="token ids that an adapter may add to the model's"
    )
    lora_full_weight_bytes: int | None = option(
        None,
        group=LORA,
        minimum=0,
        maximum=MAX_BYTES,
        help="memory for embeddings and heads of the adapters in slots, LoRA on them included",
        default_text="four vocabulary matrices, at most a sixteenth of the memory that may be used",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ConfigError(
                f"--max-cpu-loras is {self.max_cpu_loras}, less than --max-loras {self.max_loras}: the host cache "
                "backs the device slots. Raise --max-cpu-loras or lower --max-loras."
            )


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of any engine, LoRA aside. `None` means: derived from the model or the memory plan."""

    # model/source.py resolves it to a directory with safetensors and tokenizer.json.
    model: str = option(
        is_positional=True,
        is_required=True,
        group=MODEL,
        metavar="MODEL",
        help="a directory, a Hugging Face id (org/name), or a .gguf file",
    )
    dtype: str = option(
        "auto",
        group=MODEL,
        choices=DTYPES,
        help="dtype of weights and activations; auto: the checkpoint's; on a CPU float16 becomes bfloat16",
    )
    quantization: str | None = option(
        None,
        group=MODEL,
        choices=QUANTIZATIONS,
        help="keep the decoder's linear layers as 8-bit integers, rounded at start-up with a scale per output; "
        "embeddings, head, activations and adapters stay in bfloat16",
        default_text="none",
    )
    device: str = option("auto", group=MODEL, choices=DEVICES, help="auto: CUDA if there is a device, else the CPU")
    max_model_len: int | None = option(
        None,
        group=MODEL,
        minimum=1,
        maximum=10_000_000,
        help="tokens of prompt and answer together",
        default_text="the model's",
    )
    tensor_parallel_size: int = option(
        1, group=MODEL, minimum=1, maximum=1024, help="ranks of a worker, which share the model"
    )
    num_threads: int | None = option(
        None,
        group=MODEL,
        minimum=1,
        maximum=4096,
        help="CPU threads of each rank",
        default_text="its share of the cores that affinity and CPU quota allow",
    )
    max_num_seqs: int = option(64, group=BATCHING, minimum=1, maximum=100_000, help="sequences in one step")
    max_num_batched_tokens: int | None = option(
        None,
        group=BATCHING,
        minimum=1,
        maximum=10_000_000,
        help="tokens computed in one step, at least --max-num-seqs",
        default_text="512 on a CPU, 2048 on CUDA",
    )
    max_adapter_wait_s: float = option(
        60.0,
        group=BATCHING,
        minimum=1.0,
        maximum=DAY_S,
        off=0.0,
        help="maximum time a tenant's requests for one model may go without a token while others get some. Near it, "
        "running requests are preempted; requests that cannot be served in time get 429. 0: no limit",
    )
    adapter_read_timeout_s: float = option(
        30.0,
        group=BATCHING,
        minimum=0.1,
        maximum=DAY_S,
        help="maximum time to read an adapter's files, plus a second for every 10 MiB of a large one; after it, "
        "requests for the adapter get 503",
    )
    block_size: int = option(16, group=BATCHING, choices=BLOCK_SIZES, help="tokens in one page of the KV cache")
    enable_prefix_caching: bool = option(
        True, group=BATCHING, help="compute a shared prompt prefix once per tenant and adapter, and reuse it"
    )
    enforce_eager: bool = option(
        False,
        group=BATCHING,
        help="launch steps op by op: no CUDA graphs, and on a CPU no recorded steps; slower, for finding faults",
    )
    gpu_memory_utilization: float = option(
        0.9,
        group=BATCHING,
        metavar="FRACTION",
        above=0.0,
        maximum=1.0,
        help="fraction of the device's memory that may be used; on a CPU, of the machine's or the container's",
    )
    kv_cache_memory_bytes: int | None = option(
        None,
        group=BATCHING,
        minimum=1,
        maximum=MAX_BYTES,
        help="KV cache size, e.g. 2GiB",
        default_text="what is left on a GPU; on a CPU half of what is left, at most 4GiB",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.quantization is not None and self.dtype not in ("auto", "bfloat16"):
            raise ConfigError(
                f"--quantization {self.quantization} computes in bfloat16, but --dtype is {self.dtype}. Leave "
                "--dtype out, or leave out --quantization."
            )
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens is {self.max_num_batched_tokens}, less than --max-num-seqs "
                f"{self.max_num_seqs}: every running sequence needs a token a step. Raise one or lower the other."
            )

    def check_context(self, max_position: int, architecture: str) -> None:
        """Raises `MemoryPlanError` where more tokens are asked for than the model has positions."""
        if self.max_model_len is not None and self.max_model_len > max_position:
            raise MemoryPlanError(
                f"--max-model-len is {self.max_model_len}; {architecture} was made for {max_position} positions. Give "
                f"at most {max_position}."
            )


@dataclass(frozen=True, slots=True)
class EngineConfig(EngineOptions):
    """One engine: the model, its limits, its device."""

    max_waiting: int | None = option(  # None: any number
        4096,
        group=BATCHING,
        minimum=1,
        maximum=10_000_000,
        help="requests (one for each choice) that a worker queues beyond those in its batch; more get 429",
    )
    lora: LoRAConfig | None = None  # None: LoRA is off
    workers_per_host: int = 1  # that share the host with this one, itself included; filled in by who places them

    def compute_dtype(self, checkpoint: str, *, on_cpu: bool) -> str:
        """Return `dtype` with auto resolved to the checkpoint's; on a CPU bfloat16 stands in for float16."""
        if self.dtype != "auto":
            return self.dtype
        if self.quantization or (checkpoint == "float16" and on_cpu):
            return "bfloat16"
        return checkpoint if checkpoint in DTYPES[1:] else "bfloat16"

    def adapter_dtype(self, dtype: str) -> str:
        """Return the dtype of adapter weights. dtype: the model's."""
        return dtype if self.lora is None or self.lora.lora_dtype == "auto" else self.lora.lora_dtype

    def batched_tokens(self, *, on_cpu: bool) -> int:
        """Return `max_num_batched_tokens` or its default, small on a CPU, where a long step delays every request."""
        return self.max_num_batched_tokens or max(512 if on_cpu else 2048, self.max_num_seqs)

    @property
    def ranks_per_host(self) -> int:
        """Return the number of ranks that share this host's cores, this one included."""
        return self.tensor_parallel_size * self.workers_per_host

    @property
    def threads(self) -> int:
        return self.num_threads or share(num_usable_cores(), self.ranks_per_host)
