"""Checks of the small files of a model and of adapters, before Ray or torch is loaded.

Owns: refusing in milliseconds what a worker would certainly refuse after its start. Anything uncertain is left to the
worker, such as the weights (adapters/format.py) and the free memory (model/device.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lorafleet.workers.adapters.config import CONFIG_FILE, MAX_CONFIG_BYTES, read_config
from lorafleet.workers.adapters.folder import AdapterFolder
from lorafleet.workers.adapters.foreign import WEIGHTS, missing_weights
from lorafleet.workers.config import EngineConfig, LoRAModule
from lorafleet.workers.errors import AdapterRefusedError, LoRAFleetError
from lorafleet.workers.found_file import json_object
from lorafleet.workers.host_memory import host_memory
from lorafleet.workers.model.architecture import ModelSpec, read_architecture
from lorafleet.workers.model.memory_plan import DeviceMemory, plan_memory
from lorafleet.workers.model.shards import linear_shards
from lorafleet.workers.sources import hub
from lorafleet.workers.sources.adapters import resolve_adapter

_SIZES: Final = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_MAY_HAVE_CUDA: Final = Path("/dev/nvidiactl")


def check_files(config: EngineConfig, modules: Sequence[LoRAModule], *, are_here: bool) -> None:
    """Check a resolved model and its adapters, without downloading anything.

    are_here: the workers run on this machine, so a missing file is missing for them too. Raises `ModelError`,
    `MemoryPlanError`, and `AdapterRefusedError` with the adapter's name.
    """
    architecture, raw = read_architecture(Path(config.model))
    if isinstance(max_position := raw.get("max_position_embeddings"), int):
        config.check_context(max_position, architecture)
    if (spec := _sizes(architecture, raw)) is not None:
        linear_shards(spec, size=config.tensor_parallel_size)
        if are_here and (config.device == "cpu" or not _MAY_HAVE_CUDA.exists()):
            _check_plan(config, spec)
    for module in modules:
        if config.lora is None or not (_exists(module.path) or (are_here and not hub.is_hub_id(module.path))):
            continue
        try:
            _check_adapter(resolve_adapter(module.path), config.lora.max_lora_rank)
        except LoRAFleetError as error:
            error.message = f"Adapter {module.name!r}: {error.message}"
            raise


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # too long, no permission, or an unknown user's home
        return False


def _check_plan(config: EngineConfig, spec: ModelSpec) -> None:
    """Refuse what would not fit even if all of the memory were free."""
    total, _ = host_memory()
    dtype = config.compute_dtype(spec.dtype, on_cpu=True)
    memory = DeviceMemory(total, total, total, is_cpu=True)
    plan_memory(spec, config, memory, dtype=dtype, lora_dtype=config.adapter_dtype(dtype))


def _sizes(architecture: str, raw: Mapping[str, Any]) -> ModelSpec | None:
    """Return a spec with enough sizes for arithmetic; None if config.json leaves some to defaults not known here."""
    sizes: list[Any] = [raw.get(name) for name in _SIZES]
    sizes.append(raw.get("head_dim") or 1)
    if not all(type(size) is int and size > 0 for size in sizes) or sizes[1] < sizes[4]:
        return None
    layers, hidden, inner, vocab, heads, kv_heads, max_position, _ = sizes
    return ModelSpec(
        architecture=architecture,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=raw.get("head_dim") or hidden // heads,
        vocab_size=vocab,
        max_position=max_position,
        norm_eps=0.0,
        tie_embeddings=raw.get("tie_word_embeddings") is not False,  # if unset: the smaller one
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=(),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
        eos_token_ids=frozenset(),
        hf_config=None,
    )


def _check_adapter(folder: AdapterFolder, max_lora_rank: int) -> None:
    config = read_config(folder, ())
    names = folder.names()
    if WEIGHTS not in names:
        what, reason = missing_weights(names, folder.path)
        raise AdapterRefusedError(f"{folder.shown} {what}", reason=reason)
    if config.lora_rank > max_lora_rank and _is_rank_of_all(folder):
        raise folder.refused(
            CONFIG_FILE,
            f"has rank {config.lora_rank}; the limit is {max_lora_rank}. Start with --max-lora-rank "
            f"{config.lora_rank}.",
            "rank_too_large",
        )


def _is_rank_of_all(folder: AdapterFolder) -> bool:
    """Return whether `r` is certainly some module's rank; with patterns the tensors decide."""
    fields = json_object(folder.read(CONFIG_FILE, MAX_CONFIG_BYTES) or b"{}")
    return bool(fields.get("target_modules")) and not fields.get("rank_pattern")
