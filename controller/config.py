"""What `lorafleet serve` was told: built and validated once by the CLI, frozen, passed whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from lorafleet.controller.gateway.api_keys import check_keys
from lorafleet.controller.gateway.limits import Limits
from lorafleet.workers.config import EngineConfig, LoRAModule
from lorafleet.workers.errors import ConfigError

GatewayNodes = Literal["none", "head", "all"]
GATEWAY_NODES: Final[tuple[GatewayNodes, ...]] = ("none", "head", "all")


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """A whole fleet on one command line."""

    engine: EngineConfig
    served_model_names: tuple[str, ...]  # of the base model; the first is canonical
    adapters: tuple[LoRAModule, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_api_keys: tuple[str, ...] = field(default=(), repr=False)  # that may load and unload adapters
    tenants_file: str | None = None  # read and checked; the gateway reads it again
    seed: int | None = None
    drain_timeout_s: float = 30.0
    allow_runtime_lora_updates: bool = False  # POST /v1/load_lora_adapter and /v1/unload_lora_adapter
    lora_roots: tuple[
        str, ...
    ] = ()  # below which adapters that are loaded so must lie; see workers/sources/adapters.py
    num_workers: int = 1
    gateway_processes: int = 1  # on one port
    hung_step_s: float = 60.0  # age of a step at which its worker is replaced
    worker_wait_s: float = 60.0  # of a request that no worker can take
    worker_ports: tuple[int, int] | None = None  # of the workers' gRPC servers, the last one included; None: any
    ray_address: str | None = None  # None: a Ray of our own on this machine
    log_level: str = "warning"
    limits: Limits = field(default_factory=Limits)  # of each gateway process

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; it must be between 1 and 65535.")
        if not 0 <= self.drain_timeout_s < 86400:
            raise ConfigError(f"--drain-timeout-s is {self.drain_timeout_s}; it must be between 0 and 86400.")
        if not 1 <= self.hung_step_s < 86400:
            raise ConfigError(f"--hung-step-s is {self.hung_step_s}; it must be between 1 and 86400.")
        if not 0 <= self.worker_wait_s < 86400:
            raise ConfigError(f"--worker-wait-s is {self.worker_wait_s}; it must be between 0 and 86400.")
        if self.worker_ports is not None and not 1 <= self.worker_ports[0] <= self.worker_ports[1] <= 65535:
            low, high = self.worker_ports
            raise ConfigError(f"--worker-ports is {low}-{high}; give the first and the last port, between 1 and 65535.")
        if self.num_workers < 1:
            raise ConfigError(f"--num-workers is {self.num_workers}; it must be at least 1.")
        if self.gateway_processes < 1:
            raise ConfigError(f"--gateway-processes is {self.gateway_processes}; it must be at least 1.")
        if not all(self.served_model_names):
            raise ConfigError("--served-model-name has an empty name.")
        check_keys("--api-key", self.api_keys)
        check_keys("--admin-api-key", self.admin_api_keys)
        if self.adapters and self.engine.lora is None:
            raise ConfigError("--lora-modules is given without --enable-lora. Add --enable-lora.")
        if self.allow_runtime_lora_updates and self.engine.lora is None:
            raise ConfigError("--allow-runtime-lora-updates is given without --enable-lora. Add --enable-lora.")
        if self.allow_runtime_lora_updates and not self.lora_roots:
            raise ConfigError(
                "--allow-runtime-lora-updates needs --lora-root: a directory, hf:// or hf://ORG that adapters may be "
                "loaded from."
            )
        if self.lora_roots and not self.allow_runtime_lora_updates:
            raise ConfigError("--lora-root is given without --allow-runtime-lora-updates, where it has no effect.")
        for root in self.lora_roots:
            if not root.startswith("hf://") and not Path(root).is_absolute():
                raise ConfigError(f"--lora-root is {root!r}; give an absolute directory, hf:// or hf://ORG.")
        counts = Counter([*self.served_model_names, *(adapter.name for adapter in self.adapters)])
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            raise ConfigError(f"The model name {twice[0]!r} is given twice; every model and adapter needs its own.")
