"""Keyword arguments of the offline engines, named as in vLLM, and their conversion to an `EngineConfig`."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

from lorafleet.workers.config import LORA, MODEL, EngineConfig, EngineOptions, LoRAConfig
from lorafleet.workers.errors import ConfigError
from lorafleet.workers.options import option, option_of, options_of


@dataclass(frozen=True)
class LoRASwitch:
    """The switch for LoRA. Without it LoRA's options have no effect, so they are refused."""

    enable_lora: bool = option(False, group=LORA, help="serve adapters")


@dataclass(frozen=True)
class EngineArgs(LoRAConfig, LoRASwitch, EngineOptions):
    """The options of an engine and of LoRA side by side, as `lorafleet serve` takes them.

    model: a directory, a Hugging Face id or a GGUF file. One default is another: max_adapter_wait_s is 0, no limit,
    since what runs offline queues everything at once and wants it done soonest.
    """

    max_adapter_wait_s: float = option_of(EngineOptions, "max_adapter_wait_s", default=0.0)
    seed: int | None = option(
        None,
        group=MODEL,
        minimum=-(2**63),
        maximum=2**64 - 1,
        help="makes the draws of requests without a seed repeatable",
        default_text="a random one",
    )

    def __post_init__(self) -> None:
        if isinstance(self.model, os.PathLike):
            object.__setattr__(self, "model", os.fspath(self.model))
        for entry in options_of(LoRAConfig):
            if getattr(self, entry.name) is None:  # the default, for callers that pass on what they were not given
                object.__setattr__(self, entry.name, entry.default)
        EngineOptions.__post_init__(self)

    def to_config(self) -> EngineConfig:
        """Check everything and resolve the model to a directory (download or convert it if needed).

        Raises `ConfigError` or `ModelError`.
        """
        from lorafleet.workers.sources.models import resolve_model

        if self.tensor_parallel_size > 1:
            raise ConfigError(
                f"tensor_parallel_size is {self.tensor_parallel_size}; the offline engine is one rank in this process."
            )
        given = {entry.name: getattr(self, entry.name) for entry in fields(EngineOptions)}
        given |= {"model": str(resolve_model(self.model)), "max_waiting": None, "lora": self._lora()}
        return EngineConfig(**given)

    def _lora(self) -> LoRAConfig | None:
        options = {entry.name: (getattr(self, entry.name), entry.default) for entry in options_of(LoRAConfig)}
        given = {name: value for name, (value, default) in options.items() if value != default}
        if self.enable_lora:
            return LoRAConfig(**given)
        if given:
            raise ConfigError(f"{', '.join(given)} given without enable_lora=True, where it would have no effect.")
        return None
