"""The flags that `lorafleet serve` and `lorafleet up` have in common, and the configuration that they come to.

Owns: their help, their refusals. Leaves to others: the commands (cli.py), checks of values (controller/config.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorafleet.controller.arguments.byte_size import byte_size
from lorafleet.controller.config import ServeConfig
from lorafleet.controller.gateway.api_keys import add_key_flags, given_keys
from lorafleet.controller.gateway.limits import Limits
from lorafleet.controller.gateway.tenants import read_tenants, tenants_of
from lorafleet.workers.config import DEVICES, DTYPES, QUANTIZATIONS, EngineConfig, LoRAConfig, LoRAModule
from lorafleet.workers.errors import ConfigError
from lorafleet.workers.scheduling.eviction import EVICTIONS

VLLM_UPDATES_VARIABLE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"

# LoRA flags by destination; given without --enable-lora they would have no effect, so they are refused.
_LORA_FLAGS = {
    "max_loras": "--max-loras",
    "max_lora_rank": "--max-lora-rank",
    "max_cpu_loras": "--max-cpu-loras",
    "host_cache_bytes": "--lora-host-cache-bytes",
    "lora_dtype": "--lora-dtype",
    "eviction": "--lora-eviction",
    "extra_vocab_size": "--lora-extra-vocab-size",
    "full_weight_bytes": "--lora-full-weight-bytes",
}


def add_fleet_flags(parser: argparse.ArgumentParser, *, ray_address: str | None, ray_help: str) -> None:
    """What `serve` and `up` have in common."""
    engine, lora = EngineConfig(model=""), LoRAConfig()
    parser.add_argument("model", metavar="MODEL", help="a directory, a Hugging Face id (org/name), or a .gguf file")

    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    http.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    http.add_argument(
        "--gateway-processes",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the port and the work of HTTP, tokenizing and streaming (default: %(default)s)",
    )
    add_key_flags(http)
    http.add_argument(
        "--tenants",
        metavar="FILE",
        help='tenants that share the workers by weight: JSON, [{"name": "acme", "api_keys": ["..."], "weight": 2.0, '
        '"priority": 0}]; weight (default 1) is a share of service, tenants of lower priority (default 0) come first '
        "(default: each API key is a tenant)",
    )
    http.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="names of the base model (default: MODEL as given)"
    )
    http.add_argument(
        "--drain-timeout-s",
        type=float,
        default=30.0,
        help="seconds that running requests get at shutdown (default: %(default)s)",
    )

    Limits.add_flags(parser.add_argument_group("bounds of each gateway process"))

    model = parser.add_argument_group("model")
    model.add_argument("--dtype", choices=DTYPES, default=engine.dtype, help="(default: the checkpoint's)")
    model.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="keep the decoder's linear layers as 8-bit integers, rounded at start-up with a scale per output; "
        "embeddings, head, activations and adapters stay in bfloat16 (default: none)",
    )
    model.add_argument("--device", choices=DEVICES, default=engine.device, help="(default: CUDA if there is one)")
    model.add_argument(
        "--max-model-len", type=int, metavar="N", help="tokens of prompt and answer together (default: the model's)"
    )
    model.add_argument("--seed", type=int, help="makes the draws of requests without a seed repeatable")
    model.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="ranks of a worker, which share the model"
    )
    model.add_argument(
        "--num-threads",
        type=int,
        metavar="N",
        help="CPU threads of each rank (default: its share of the cores that affinity and CPU quota allow)",
    )

    batch = parser.add_argument_group("batching and memory")
    batch.add_argument(
        "--max-num-seqs", type=int, default=engine.max_num_seqs, help="sequences in one step (default: %(default)s)"
    )
    batch.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help="tokens computed in one step (default: 512 on a CPU, 2048 on CUDA)",
    )
    batch.add_argument(
        "--max-waiting",
        type=int,
        default=engine.max_waiting,
        metavar="N",
        help="requests (one for each choice) that a worker queues beyond those in its batch; more get 429 (default: "
        "%(default)s)",
    )
    batch.add_argument(
        "--max-adapter-wait-s",
        type=float,
        default=engine.max_adapter_wait_s,
        metavar="S",
        help="the longest that a client (a tenant's requests for one model) gets no token while others do; near it "
        "running requests give way, and more clients than can be served in time get 429; 0 is no bound "
        "(default: %(default)g)",
    )
    batch.add_argument(
        "--adapter-read-timeout-s",
        type=float,
        default=engine.adapter_read_timeout_s,
        metavar="S",
        help="after which a read of an adapter's files is given up, and its requests get 503; a large adapter has a "
        "second more for 10 MiB (default: %(default)g)",
    )
    batch.add_argument(
        "--block-size", type=int, default=engine.block_size, help="tokens of a KV page (default: %(default)s)"
    )
    batch.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=engine.enable_prefix_caching,
        help="compute the beginning that prompts have in common once, for each adapter and tenant (default: on)",
    )
    batch.add_argument(
        "--enforce-eager",
        action="store_true",
        help="launch steps op by op: no CUDA graphs, and on a CPU no recorded steps; slower, for finding faults",
    )
    batch.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=engine.gpu_memory_utilization,
        metavar="FRACTION",
        help="of the device's memory that may be used; on a CPU, of the machine's or container's "
        "(default: %(default)s)",
    )
    batch.add_argument(
        "--kv-cache-memory-bytes",
        type=byte_size,
        metavar="SIZE",
        help="of the KV cache, such as 2GiB (default: what is left on a GPU; on a CPU at most 4GiB and half of that)",
    )

    adapters = parser.add_argument_group("LoRA")
    adapters.add_argument("--enable-lora", action="store_true", help="serve adapters")
    adapters.add_argument(
        "--lora-modules",
        nargs="+",
        action="extend",
        type=lora_module,
        metavar="NAME=PATH",
        help="adapters to serve; PATH is a directory, a hub id or a hub cache folder. Or JSON: "
        '{"name": ..., "path": ..., "base_model_name": ..., "weight": 1.0, "pin": false}: weight is its share of its '
        "tenant's service, pin keeps it in a device slot",
    )
    adapters.add_argument(
        "--max-loras", type=int, metavar="N", help=f"adapters in one batch (default: {lora.max_loras})"
    )
    adapters.add_argument(
        "--max-lora-rank", type=int, metavar="N", help=f"largest rank that fits a slot (default: {lora.max_lora_rank})"
    )
    adapters.add_argument(
        "--max-cpu-loras", type=int, metavar="N", help="adapters in the host cache (default: bounded by bytes)"
    )
    adapters.add_argument(
        "--lora-host-cache-bytes",
        dest="host_cache_bytes",
        type=byte_size,
        metavar="SIZE",
        help="of the host cache (default: at most 1GiB and an eighth of the free memory)",
    )
    adapters.add_argument("--lora-dtype", choices=DTYPES, help="of adapter weights (default: the model's)")
    adapters.add_argument(
        "--lora-eviction",
        dest="eviction",
        choices=EVICTIONS,
        help="which adapter makes room for another: the least recently used, or the cheapest to do without, "
        f"by size, reload time, recency and frequency (default: {lora.eviction})",
    )
    adapters.add_argument(
        "--lora-extra-vocab-size",
        dest="extra_vocab_size",
        type=int,
        metavar="N",
        help=f"token ids that an adapter may add to the model's (default: {lora.extra_vocab_size})",
    )
    adapters.add_argument(
        "--lora-full-weight-bytes",
        dest="full_weight_bytes",
        type=byte_size,
        metavar="SIZE",
        help="of the embeddings and heads that adapters in slots have of their own, LoRA on them included (default: "
        "four vocabulary matrices, and at most a sixteenth of the memory that may be used)",
    )
    adapters.add_argument(
        "--allow-runtime-lora-updates",
        action="store_true",
        help="serve POST /v1/load_lora_adapter and /v1/unload_lora_adapter (default: off; "
        f"${VLLM_UPDATES_VARIABLE}=1 turns it on too)",
    )
    adapters.add_argument(
        "--lora-root",
        nargs="+",
        action="extend",
        metavar="ROOT",
        help="where adapters that are loaded at run time may come from: directories, hf:// for any Hugging Face id, "
        "hf://ORG for one organisation's",
    )

    fleet = parser.add_argument_group("fleet")
    fleet.add_argument(
        "--num-workers",
        type=int,
        default=1,
        metavar="N",
        help="workers, each with the whole model (in its ranks) and its own adapter cache; requests go to the one that "
        "is to answer first (default: %(default)s)",
    )
    fleet.add_argument(
        "--hung-step-s",
        type=float,
        default=60.0,
        help="seconds after which a worker whose step does not end is replaced, and its requests go on with another; "
        "after a third of it it gets no new ones (default: %(default)s)",
    )
    fleet.add_argument(
        "--worker-wait-s",
        type=float,
        default=60.0,
        help="seconds that a request waits while no worker can take it or go on with it; then it gets 503 "
        "(default: %(default)s)",
    )
    fleet.add_argument(
        "--worker-ports",
        type=port_range,
        metavar="LOW-HIGH",
        help="ports that gateways and controller reach workers on, for firewalls (default: any)",
    )
    fleet.add_argument("--ray-address", metavar="ADDRESS", default=ray_address, help=ray_help)
    fleet.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="warning")


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """The flags as a checked configuration. Raises `ConfigError`."""
    given = {name: getattr(args, name) for name in _LORA_FLAGS if getattr(args, name) is not None}
    if given and not args.enable_lora:
        flags = ", ".join(_LORA_FLAGS[name] for name in given)
        raise ConfigError(f"{flags} is given without --enable-lora, where it would have no effect.")
    # Whoever has the variable set for vLLM may well start servers without LoRA too.
    by_variable = args.enable_lora and os.environ.get(VLLM_UPDATES_VARIABLE, "").lower() in ("1", "true")
    engine = EngineConfig(
        model=args.model,
        dtype=args.dtype,
        quantization=args.quantization,
        device=args.device,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_waiting=args.max_waiting,
        max_adapter_wait_s=args.max_adapter_wait_s,
        adapter_read_timeout_s=args.adapter_read_timeout_s,
        block_size=args.block_size,
        enable_prefix_caching=args.enable_prefix_caching,
        enforce_eager=args.enforce_eager,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        gpu_memory_utilization=args.gpu_memory_utilization,
        tensor_parallel_size=args.tensor_parallel_size,
        num_threads=args.num_threads,
        lora=LoRAConfig(**given) if args.enable_lora else None,
    )
    api_keys, admin_api_keys = given_keys(args)
    tenants_file = None
    if args.tenants is not None:
        tenants_of(api_keys, read_tenants(Path(args.tenants)))  # refuses now what the gateway would refuse
        tenants_file = str(Path(args.tenants).absolute())
    return ServeConfig(
        engine=engine,
        served_model_names=tuple(args.served_model_name or [args.model]),
        adapters=tuple(args.lora_modules or ()),
        host=args.host,
        port=args.port,
        api_keys=api_keys,
        admin_api_keys=admin_api_keys,
        tenants_file=tenants_file,
        seed=args.seed,
        drain_timeout_s=args.drain_timeout_s,
        allow_runtime_lora_updates=args.allow_runtime_lora_updates or by_variable,
        lora_roots=tuple(_lora_root(root) for root in args.lora_root or ()),
        num_workers=args.num_workers,
        gateway_processes=args.gateway_processes,
        hung_step_s=args.hung_step_s,
        worker_wait_s=args.worker_wait_s,
        worker_ports=args.worker_ports,
        ray_address=args.ray_address,
        log_level=args.log_level,
        limits=Limits.of_flags(args),
    )


def _lora_root(root: str) -> str:
    # Workers on other nodes, or in Ray's own directories, know nothing of this one.
    return root if root.startswith("hf://") else str(Path(root).expanduser().absolute())


def with_flags_file(argv: Sequence[str]) -> list[str]:
    """The command line, with the flags of FILE in the place of @FILE behind the command.

    Only there: anywhere else a value may begin with @. Raises `ConfigError`.
    """
    if len(argv) < 2 or argv[0] not in ("serve", "up") or not argv[1].startswith("@"):
        return list(argv)
    path = Path(argv[1][1:]).expanduser()
    try:
        return [argv[0], *shlex.split(path.read_text(), comments=True), *argv[2:]]
    except (OSError, ValueError) as error:  # ValueError: an open quotation, or no text
        raise ConfigError(f"The flags of {path} cannot be read: {error}.") from error


def port(text: str) -> int:
    """A port's number."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; give a number between 1 and 65535")
    return int(text)


def port_range(text: str) -> tuple[int, int]:
    """LOW-HIGH → both."""
    low, dash, high = text.partition("-")
    if not dash or not (low.isdecimal() and high.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW-HIGH, such as 50100-50199")
    return int(low), int(high)


def drain_timeout(text: str) -> float:
    """Seconds, at most a day."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < 86400:
        raise argparse.ArgumentTypeError(f"{text!r} must be seconds between 0 and 86400")
    return seconds


def lora_module(text: str) -> LoRAModule:
    """NAME=PATH, or vLLM's JSON form."""
    if text.lstrip().startswith("{"):
        return _lora_module_from_json(text)
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH, nor a JSON object with name and path")
    return LoRAModule(name, path)


def _lora_module_from_json(text: str) -> LoRAModule:
    try:
        fields: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from error
    unknown = sorted(set(fields) - {"name", "path", "base_model_name", "weight", "pin"})
    if unknown:
        raise argparse.ArgumentTypeError(f"{text!r} has the unknown field {unknown[0]!r}")
    if not all(isinstance(fields.get(key), str) and fields[key] for key in ("name", "path")):
        raise argparse.ArgumentTypeError(f"{text!r} needs a name and a path")
    weight, pin = fields.get("weight", 1.0), fields.get("pin", False)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not isinstance(pin, bool):
        raise argparse.ArgumentTypeError(f"{text!r} must have a number as weight, and true or false as pin")
    try:
        return LoRAModule(fields["name"], fields["path"], fields.get("base_model_name"), float(weight), pin)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(error.message) from error


def resolved(config: ServeConfig) -> ServeConfig:
    """With the model and local adapters as absolute paths. Raises `ModelError`."""
    from lorafleet.workers.sources.models import resolve_model

    model = str(resolve_model(config.engine.model))
    # Workers on other nodes, or in Ray's own directories, know nothing of this one.
    adapters = tuple(
        dataclasses.replace(adapter, path=str(Path(adapter.path).expanduser().absolute()))
        if Path(adapter.path).expanduser().exists()
        else adapter
        for adapter in config.adapters
    )
    engine = dataclasses.replace(config.engine, model=model)
    return dataclasses.replace(config, engine=engine, adapters=adapters)
