"""Keyword arguments of the offline engines, named as in vLLM, and their conversion to an `EngineConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArgs:
    """Names, meaning and defaults are those of `lorafleet serve`'s flags; a test compares them.

    model: a directory, a Hugging Face id or a GGUF file. One default differs: max_adapter_wait_s is 0 (no limit),
    because offline users submit everything at once and want it finished soonest.
    """

    model: str
    dtype: str = "auto"
    quantization: str | None = None
    device: str = "auto"
    seed: int | None = None  # makes requests without a seed repeatable
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    max_adapter_wait_s: float = 0.0
    adapter_read_timeout_s: float = 30.0
    block_size: int = 16
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    num_threads: int | None = None
    enable_lora: bool = False
    max_loras: int | None = None
    max_lora_rank: int | None = None
    max_cpu_loras: int | None = None
    lora_host_cache_bytes: int | None = None
    lora_dtype: str | None = None
    lora_eviction: str | None = None
    lora_extra_vocab_size: int | None = None
    lora_full_weight_bytes: int | None = None

    def to_config(self) -> EngineConfig:
        """Check everything and resolve the model to a directory (download or convert it if needed).

        Raises `ConfigError` or `ModelError`.
        """
        from lorafleet.workers.sources.models import resolve_model

        if self.tensor_parallel_size > 1:
            raise ConfigError(
                f"tensor_parallel_size is {self.tensor_parallel_size}; the offline engine is one rank in this process."
            )
        return EngineConfig(
            model=str(resolve_model(self.model)),
            dtype=self.dtype,
            quantization=self.quantization,
            device=self.device,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_waiting=None,
            max_adapter_wait_s=self.max_adapter_wait_s,
            adapter_read_timeout_s=self.adapter_read_timeout_s,
            block_size=self.block_size,
            enable_prefix_caching=self.enable_prefix_caching,
            enforce_eager=self.enforce_eager,
            kv_cache_memory_bytes=self.kv_cache_memory_bytes,
            gpu_memory_utilization=self.gpu_memory_utilization,
            num_threads=self.num_threads,
            lora=self._lora(),
        )

    def _lora(self) -> LoRAConfig | None:
        given = {
            "max_loras": self.max_loras,
            "max_lora_rank": self.max_lora_rank,
            "max_cpu_loras": self.max_cpu_loras,
            "host_cache_bytes": self.lora_host_cache_bytes,
            "lora_dtype": self.lora_dtype,
            "eviction": self.lora_eviction,
            "extra_vocab_size": self.lora_extra_vocab_size,
            "full_weight_bytes": self.lora_full_weight_bytes,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if not self.enable_lora:
            if given:
                raise ConfigError(f"{', '.join(given)} given without enable_lora=True would have no effect.")
            return None
        return LoRAConfig(**given)  # type: ignore[arg-type]
