"""The configuration of the commands on fleets: built and validated once by the CLI, frozen, passed whole.

Owns: the options of a fleet and of a Ray cluster, their defaults and checks. Leaves to others: those of gateways
(gateway/options.py), of engines and LoRA (workers/config.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorafleet.controller.arguments.lora_module import lora_module
from lorafleet.controller.arguments.port_range import port_range
from lorafleet.controller.gateway.api_keys import API_KEY_VARIABLE, keys_of_variable
from lorafleet.controller.gateway.options import HTTP, GatewayOptions
from lorafleet.workers.config import LORA, EngineConfig, LoRAModule
from lorafleet.workers.errors import ConfigError, quoted
from lorafleet.workers.options import DAY_S, check_options, option, option_of

FLEET, CLUSTER = "fleet", "cluster"
VLLM_UPDATES_VARIABLE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
GatewayNodes = Literal["none", "head", "all"]


@dataclass(frozen=True, slots=True)
class ServeConfig(GatewayOptions):
    """A whole fleet on one command line."""

    engine: EngineConfig
    served_model_names: tuple[str, ...] = option(  # the first is canonical
        group=HTTP,
        flag="--served-model-name",
        metavar="NAME",
        help="names of the base model",
        default_text="MODEL as given",
    )
    adapters: tuple[LoRAModule, ...] = option(
        (),
        group=LORA,
        flag="--lora-modules",
        metavar="NAME=PATH",
        parse=lora_module,
        help="adapters to serve; PATH is a directory, a hub id or a hub cache folder. Or JSON: "
        '{"name": ..., "path": ..., "base_model_name": ..., "weight": 1.0, "pin": false}: weight is its share of its '
        "tenant's service, pin keeps it in a device slot",
        default_text="none",
    )
    allow_runtime_lora_updates: bool = option(
        False,
        group=LORA,
        help="serve POST /v1/load_lora_adapter and /v1/unload_lora_adapter; "
        f"${VLLM_UPDATES_VARIABLE}=1 turns it on too",
    )
    lora_roots: tuple[str, ...] = option(  # workers/sources/adapters.py enforces them
        (),
        group=LORA,
        flag="--lora-root",
        metavar="ROOT",
        help="sources of adapters loaded at run time: directories, hf:// for any Hugging Face id, "
        "hf://ORG for those of one organisation",
        default_text="nowhere",
    )
    num_workers: int = option(
        1,
        group=FLEET,
        minimum=1,
        maximum=4096,
        help="workers, each with the whole model (in its ranks) and its own adapter cache; a request goes to the one "
        "with the lowest expected time to first token",
    )
    gateway_processes: int = option(
        1,
        group=FLEET,
        minimum=1,
        maximum=1024,
        help="gateway processes, which share the port and the work of HTTP, tokenizing and streaming",
    )
    hung_step_s: float = option(
        60.0,
        group=FLEET,
        minimum=1.0,
        maximum=DAY_S,
        help="age of an engine step at which its worker is replaced, and its requests are resumed by another worker; "
        "at a third of it the worker gets no new requests",
    )
    worker_ports: tuple[int, int] | None = option(  # the last one included
        None,
        group=FLEET,
        metavar="LOW-HIGH",
        parse=port_range,
        help="ports of the workers for gateways and controller, for firewalls",
        default_text="any",
    )
    ray_address: str | None = option(
        None,
        group=FLEET,
        metavar="ADDRESS",
        help="a running Ray cluster to use",
        default_text="a Ray of its own on this machine",
    )

    def __post_init__(self) -> None:
        GatewayOptions.__post_init__(self)
        if self.worker_ports is not None and not 1 <= self.worker_ports[0] <= self.worker_ports[1] <= 65535:
            low, high = self.worker_ports
            raise ConfigError(f"--worker-ports is {low}-{high}; give the first and the last port, between 1 and 65535.")
        if not all(self.served_model_names):
            raise ConfigError("--served-model-name has an empty name.")
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
                raise ConfigError(f"--lora-root is {quoted(root)}; give an absolute directory, hf:// or hf://ORG.")
        counts = Counter([*self.served_model_names, *(adapter.name for adapter in self.adapters)])
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            raise ConfigError(
                f"The model name {quoted(twice[0])} is given twice; every model and adapter needs its own."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """The cluster of a command on a running Ray cluster."""

    ray_address: str = option(
        "auto",
        group=CLUSTER,
        metavar="ADDRESS",
        help="address of the Ray cluster",
        default_text="the one of this machine",
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions(ClusterOptions):
    """The placement of a fleet by `lorafleet up`, and whether the command stays."""

    gateways: GatewayNodes = option(
        "head",
        group=CLUSTER,
        help="nodes that run --gateway-processes, including those that join later; for access from other machines "
        "give --host 0.0.0.0",
    )
    controller_port: int = option(
        50050, group=CLUSTER, minimum=1, maximum=65535, help="port of the controller, on the head node"
    )
    token_file: Path = option(
        Path("~/.lorafleet/token"),
        group=CLUSTER,
        metavar="FILE",
        help="holds the token that gateways show the controller and the workers; created if missing",
    )
    follow: bool = option(
        False,
        group=CLUSTER,
        help="wait for nodes that have room, stay, and print what happens to the fleet; SIGTERM ends the command, not "
        "the fleet, SIGUSR1 restarts the workers; exit code 1 when the Ray cluster is lost",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StopOptions(ClusterOptions):
    """The drain of a cluster's requests."""

    drain_timeout_s: float = option_of(
        GatewayOptions, "drain_timeout_s", group=CLUSTER, help="time that running requests get"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusOptions:
    """The gateway to ask, and the form of the output."""

    url: str = option("http://127.0.0.1:8000", metavar="URL", help="address of a gateway, with or without /v1")
    api_key: str | None = option(
        None,
        metavar="KEY",
        is_secret=True,
        fallback=lambda: next(iter(keys_of_variable(API_KEY_VARIABLE)), None),
        help="API key for the gateway",
        default_text=f"${API_KEY_VARIABLE}",
    )
    json: bool = option(False, help="print the gateway's JSON, for programs")
    watch: bool = option(False, help="show it again every two seconds, until Ctrl-C")

    def __post_init__(self) -> None:
        check_options(self)
