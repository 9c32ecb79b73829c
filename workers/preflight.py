"""What the small files of a model and of adapters tell at once, before Ray or torch is loaded.

Owns: refusing in milliseconds what a worker would refuse after its start. Leaves to others: what takes the weights
(adapters/format.py) or the machine's memory (memory_plan.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorafleet.workers import hub
from lorafleet.workers.adapters.config import CONFIG_FILE, MAX_CONFIG_BYTES, read_config
from lorafleet.workers.adapters.folder import AdapterFolder
from lorafleet.workers.adapters.foreign import WEIGHTS, missing_weights
from lorafleet.workers.adapters.sources import resolve_adapter
from lorafleet.workers.config import EngineConfig, LoRAModule
from lorafleet.workers.errors import AdapterRefusedError, LoRAFleetError
from lorafleet.workers.found_file import json_object
from lorafleet.workers.model.architecture import read_architecture


def check_files(config: EngineConfig, modules: Sequence[LoRAModule], *, are_here: bool) -> None:
    """Check a resolved model and its adapters. Nothing is downloaded for that.

    are_here: the workers run on this machine, so what is not here is nowhere. Raises `ModelError`, `MemoryPlanError`,
    and `AdapterRefusedError` with the adapter's name.
    """
    architecture, raw = read_architecture(Path(config.model))
    if isinstance(max_position := raw.get("max_position_embeddings"), int):
        config.check_context(max_position, architecture)
    for module in modules:
        is_there = Path(module.path).expanduser().exists()
        if config.lora is None or not (is_there or (are_here and not hub.is_hub_id(module.path))):
            continue
        try:
            _check_adapter(resolve_adapter(module.path), config.lora.max_lora_rank)
        except LoRAFleetError as error:
            error.message = f"Adapter {module.name!r}: {error.message}"
            raise


def _check_adapter(folder: AdapterFolder, max_lora_rank: int) -> None:
    config = read_config(folder, ())
    names = folder.names()
    if WEIGHTS not in names:
        what, reason = missing_weights(names, folder.path)
        raise AdapterRefusedError(f"{folder.shown} {what}", reason=reason)
    if config.lora_rank > max_lora_rank and _is_rank_of_all(folder):
        raise folder.refused(
            CONFIG_FILE,
            f"has rank {config.lora_rank}, the limit is {max_lora_rank}. Start with --max-lora-rank "
            f"{config.lora_rank}.",
            "rank_too_large",
        )


def _is_rank_of_all(folder: AdapterFolder) -> bool:
    """Whether `r` is certainly some module's rank; with patterns the tensors decide."""
    fields = json_object(folder.read(CONFIG_FILE, MAX_CONFIG_BYTES) or b"{}")
    return bool(fields.get("target_modules")) and not fields.get("rank_pattern")
