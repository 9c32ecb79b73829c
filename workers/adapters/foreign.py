"""Descriptions of inputs that are not PEFT adapters in safetensors, with advice: predicates of sentences for users."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafleet.workers.errors import cut
from lorafleet.workers.found_file import LFS_ADVICE, LFS_POINTER, FoundFileError, open_found

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_WANTED = f"Give a PEFT directory: {CONFIG} and {WEIGHTS}"
_PICKLES = (".bin", ".pt", ".pth")
_WHOLE_MODEL = re.compile(r"(?:model|pytorch_model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?")
_SHARD = re.compile(r"adapter_model(?:-\d+-of-\d+\.(?:safetensors|bin)|\.(?:safetensors|bin)\.index\.json)")
_TRAINING_STATE = re.compile(
    r"global_step\d+|pytorch_model_fsdp.*|.*\.distcp|mp_rank_\d+_model_states\.pt|zero_pp_rank.*"
)
_NUM_NAMED = 5


def describe(path: Path, names: Sequence[str]) -> tuple[str, str]:
    """Return (description of a directory without a config, reason code)."""
    found = set(names)
    gguf = next((name for name in names if name.lower().endswith(".gguf")), None)
    if gguf is not None:
        return f"holds a GGUF file ({cut(gguf)}); GGUF adapters are not supported. {_WANTED}.", "gguf"
    if "adapters.safetensors" in found or "adapters.npz" in found:
        return f"holds an MLX adapter; these are not supported. {_MLX_ADVICE}", "mlx"
    folders = _with(CONFIG, path, names)
    if folders:
        return (
            f"has no {CONFIG}, but its folders hold adapters: {_listed(folders)}. Give the path of one of them.",
            "adapter_in_subfolder",
        )
    if "config.json" in found and any(map(_WHOLE_MODEL.fullmatch, names)):
        return (
            f"is a whole model, not an adapter (it has config.json and model weights, no {CONFIG}). Serve it as MODEL, "
            "or save the adapter alone, before it is merged, with PEFT's save_pretrained().",
            "whole_model",
        )
    if {"lora.safetensors", "params.json"} <= found:
        return f"holds a LoRA of mistral-finetune, which is not supported. {_WANTED}.", "not_peft"
    if any(name.startswith("pytorch_lora_weights.") for name in names):
        return f"holds a LoRA of diffusers or Kohya, for an image model. {_WANTED}.", "not_peft"
    if any(map(_TRAINING_STATE.fullmatch, names)):
        return f"holds the state of a training run (DeepSpeed or FSDP), not an adapter. {_SAVE_ADVICE}", "not_peft"
    if any(name.startswith("adapter_model") for name in names):
        return f"has an adapter's weights but no {CONFIG}. Copy that too: PEFT saves both.", "not_peft"
    return f"has no {CONFIG}: not a PEFT adapter. {_WANTED}.", "not_peft"


_MLX_ADVICE = (
    "Convert it to PEFT's layout: transpose each lora_a and lora_b, name them "
    "base_model.model.<module>.lora_A.weight and lora_B.weight, and write r and lora_alpha = scale × r into "
    f"{CONFIG}."
)
_SAVE_ADVICE = "Save the adapter with PEFT's save_pretrained(), all shards gathered."


def foreign_config(fields: Mapping[str, Any]) -> str | None:
    """Return what an adapter_config.json without PEFT's type belongs to; None if unknown."""
    if "lora_parameters" in fields or "fine_tune_type" in fields:
        return f"belongs to an MLX adapter; these are not supported. {_MLX_ADVICE}"
    if "architectures" in fields and "model_type" in fields:
        return "is the config of a whole model, not of an adapter. Serve the model as MODEL."
    return None


def missing_weights(names: Sequence[str], path: Path) -> tuple[str, str]:
    """Return (what a directory with a config but no weights has instead, reason code)."""
    pickle = next((name for name in names if name.endswith(_PICKLES)), None)
    shard = next((name for name in names if _SHARD.fullmatch(name)), None)
    if shard is not None:
        return (
            f"has no {WEIGHTS} but shards ({cut(shard)}); sharded adapters are not supported. Write one file: load "
            "them with PEFT and save_pretrained(), or join them with safetensors.",
            "sharded",
        )
    if pickle is not None:
        return (
            f"has no {WEIGHTS} but {cut(pickle)}, a pickle, which is never read because it can run code. Save the "
            "adapter with safetensors.",
            "pickle",
        )
    if "adapters.safetensors" in names or "adapters.npz" in names:
        return f"holds an MLX adapter; these are not supported. {_MLX_ADVICE}", "mlx"
    gguf = next((name for name in names if name.lower().endswith(".gguf")), None)
    if gguf is not None:
        return f"holds a GGUF file ({cut(gguf)}); GGUF adapters are not supported. {_WANTED}.", "gguf"
    folders = _with(WEIGHTS, path, names)
    if folders:
        return f"has no {WEIGHTS}; it lies in {_listed(folders)}. Give that path.", "adapter_in_subfolder"
    if any(map(_TRAINING_STATE.fullmatch, names)):
        return f"has no {WEIGHTS} but the state of a training run. {_SAVE_ADVICE}", "missing_weights"
    return f"has no {WEIGHTS}.", "missing_weights"


def describe_repository(files: Sequence[str]) -> tuple[str, str] | None:
    """Return what a hub repository without an adapter at its top has instead, given all names; None if unknown."""
    top = {name for name in files if "/" not in name}
    folders = sorted({name.rpartition("/")[0] for name in files if name.endswith(f"/{CONFIG}")})
    if CONFIG not in top and folders:
        return (
            f"has no {CONFIG} at its top, but its folders hold adapters: {_listed(folders)}. Download one of these "
            "folders and give its path.",
            "adapter_in_subfolder",
        )
    if CONFIG in top and WEIGHTS not in top:
        return missing_weights(sorted(top), Path())
    if CONFIG not in top and top:
        return describe(Path(), sorted(top))
    return None


def describe_file(path: Path, shown: str) -> str:
    """Return what a file is that was given instead of a directory."""
    head = head_of(path)
    if head.startswith(b"GGUF"):
        return f"is a GGUF file; GGUF adapters (GGUF LoRA) are not supported. {_WANTED}."
    if head.startswith(LFS_POINTER):
        return f"{LFS_ADVICE}."
    if Path(shown).name in (CONFIG, WEIGHTS):
        return "is a file; give the adapter's directory that contains it."
    return f"is a file; give the adapter's directory with {CONFIG} and {WEIGHTS}."


def describe_head(head: bytes) -> tuple[str, str] | None:
    """Return (what a file with these first bytes is instead of safetensors, reason code); None if unknown."""
    if head.startswith(LFS_POINTER):
        return LFS_ADVICE, "git_lfs_pointer"
    if head.startswith(b"GGUF"):
        return "is a GGUF file under another name; GGUF adapters are not supported", "gguf"
    if head[:2] == b"PK" or head[:1] == b"\x80":  # torch's zip, or a bare pickle
        return "is a pickle under another name, which is never read", "pickle"
    if head.lstrip()[:9].lower() in (b"<!doctype", b"<html") or head.lstrip()[:5].lower() == b"<html":
        return "is a web page, not the file to be downloaded", "bad_safetensors"
    return None


def head_of(path: Path, roots: Sequence[Path] = ()) -> bytes:
    """Return the first bytes of a file; none if it cannot be read."""
    try:
        with open_found(path, roots) as file:
            return file.read(64)
    except (FoundFileError, OSError):
        return b""


def _with(file: str, path: Path, names: Sequence[str]) -> list[str]:
    """Return the folders among `names` that contain `file`."""
    try:
        return [name for name in names if (path / name / file).is_file()]
    except OSError:
        return []


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(cut(name) for name in _by_number(names)[:_NUM_NAMED]) + more


def _by_number(names: Sequence[str]) -> list[str]:
    """Sort by trailing number, the highest (the newest checkpoint) first."""

    def number(name: str) -> int:
        digits = re.search(r"\d{1,9}$", name)
        return -1 if digits is None else int(digits[0])

    return sorted(names, key=number, reverse=True)
