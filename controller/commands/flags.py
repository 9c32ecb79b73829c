"""The flags of `lorafleet serve` and `lorafleet up` as one checked configuration.

Owns: checks across flags, flags in a file. Leaves to others: their declarations (controller/config.py), how argparse
reads them (arguments/flags.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from lorafleet.controller.arguments.flags import values_of
from lorafleet.controller.config import VLLM_UPDATES_VARIABLE, ServeConfig
from lorafleet.controller.gateway.tenants import read_tenants, tenants_of
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.errors import ConfigError, quoted
from lorafleet.workers.options import flag_of


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """Return the flags as a checked configuration. Raises `ConfigError`."""
    lora = values_of(LoRAConfig, args)
    if lora and not args.enable_lora:
        flags = ", ".join(map(flag_of, lora))
        raise ConfigError(f"{flags} is given without --enable-lora, where it would have no effect.")
    engine = EngineConfig(**values_of(EngineConfig, args), lora=LoRAConfig(**lora) if args.enable_lora else None)
    given = values_of(ServeConfig, args)
    given.setdefault("served_model_names", (engine.model,))
    # With the variable set for vLLM, servers without LoRA may be started too.
    if args.enable_lora and os.environ.get(VLLM_UPDATES_VARIABLE, "").lower() in ("1", "true"):
        given["allow_runtime_lora_updates"] = True
    # Workers on other nodes, or in Ray's own directories, do not know this one.
    given["lora_roots"] = tuple(map(_lora_root, given.get("lora_roots", ())))
    if tenants_file := given.get("tenants_file"):
        given["tenants_file"] = str(Path(tenants_file).absolute())
    config = ServeConfig(engine=engine, **given)
    if tenants_file:  # refused now rather than by the gateway
        tenants_of(config.api_keys, read_tenants(Path(tenants_file)), config.admin_api_keys)
    return config


def _lora_root(root: str) -> str:
    if root.startswith("hf://"):
        return root
    try:
        return str(Path(root).expanduser().absolute())
    except RuntimeError as error:  # an unknown user's home
        raise ConfigError(f"--lora-root {quoted(root)} cannot be looked up: {error}") from error


def _of_module(path: str) -> str:
    """Return an adapter's path as it is known everywhere; a hub id, or what cannot be looked up, as it is."""
    try:
        here = Path(path).expanduser()
        return str(here.absolute()) if here.exists() else path
    except (OSError, RuntimeError):  # too long, no permission, or an unknown user's home: refused by `check_files`
        return path


def with_flags_file(argv: Sequence[str]) -> list[str]:
    """Return the command line with the flags of FILE in place of @FILE after the command.

    Elsewhere a value may begin with @. Raises `ConfigError`.
    """
    if len(argv) < 2 or argv[0] not in ("serve", "up") or not argv[1].startswith("@"):
        return list(argv)
    path = argv[1][1:]
    try:
        return [argv[0], *shlex.split(Path(path).expanduser().read_text(), comments=True), *argv[2:]]
    except OSError as error:
        raise ConfigError(f"The flags of {quoted(path)} cannot be read: {error.strerror}.") from error
    except (ValueError, RuntimeError) as error:  # an open quotation, not UTF-8, or an unknown user's home
        raise ConfigError(f"The flags of {quoted(path)} cannot be read: {error}") from error


def resolved(config: ServeConfig, *, is_own_ray: bool) -> ServeConfig:
    """Return the configuration with the model and local adapters as absolute paths, after checking their small files.

    is_own_ray: the workers run on this machine. Raises `ModelError`, `MemoryPlanError` or `AdapterRefusedError`.
    """
    from lorafleet.workers.sources.models import resolve_model
    from lorafleet.workers.sources.preflight import check_files

    model = str(resolve_model(config.engine.model))
    # Workers on other nodes, or in Ray's own directories, do not know this one.
    adapters = tuple(dataclasses.replace(adapter, path=_of_module(adapter.path)) for adapter in config.adapters)
    engine = dataclasses.replace(config.engine, model=model)
    check_files(engine, adapters, are_here=is_own_ray)
    return dataclasses.replace(config, engine=engine, adapters=adapters)
