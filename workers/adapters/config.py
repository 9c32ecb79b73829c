"""PEFT's adapter_config.json, checked: everything in it is applied, neutral or refused with a reason.

Which linears an adapter changes is read off its tensors (format.py); the config says how much.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafleet.workers.errors import AdapterRefusedError

CONFIG_FILE = "adapter_config.json"

# Fields of PEFT's LoraConfig that say how the adapter was made or which modules it touches (its tensors tell that), and
# change nothing of what it computes.
_NEUTRAL = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    ]
)
_APPLIED = frozenset(
    [
        "alora_invocation_tokens",
        "alpha_pattern",
        "bias",
        "ensure_weight_tying",
        "init_lora_weights",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    ]
)
# Initialisations that rewrite the base weights, on which the adapter then relies.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LARGEST = 3.4e38  # float32, in which scalings are computed


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What a config says about the weights. A module is named as in the base model, `model.layers.0.mlp.up_proj`."""

    base_model_name: str | None
    lora_rank: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool = False  # Liu et al. 2024
    lora_bias: bool = False  # B has a bias
    trains_bias: bool = False  # the base model's biases, where it has some, are the adapter's own
    rank_pattern: tuple[tuple[re.Pattern[str], int], ...] = ()
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...] = ()
    modules_to_save: tuple[str, ...] = ()  # ends of names of modules whose whole weights are the adapter's own
    trainable_tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()  # by ends of names: the ids whose rows are its own
    ensure_weight_tying: bool = False  # what is the embedding's own is the head's too, if the base model ties them
    # Activated LoRA (Greenewald et al. 2025): it is applied from where these last begin in a prompt. Empty: everywhere.
    invocation_tokens: tuple[int, ...] = ()

    def saves(self, module: str) -> bool:
        """Whether the module's whole weight is the adapter's own."""
        return any(module.endswith(end) for end in self.modules_to_save)

    def rank(self, module: str) -> int:
        """The first pattern that names the module decides, as in PEFT."""
        return next((rank for pattern, rank in self.rank_pattern if pattern.match(module)), self.lora_rank)

    def scaling(self, module: str) -> float:
        """What B·A·x is multiplied with: alpha / r, or alpha / √r with rsLoRA (Kalajdzievski 2023)."""
        alpha = next((alpha for pattern, alpha in self.alpha_pattern if pattern.match(module)), self.lora_alpha)
        rank = self.rank(module)
        return alpha / rank**0.5 if self.use_rslora else alpha / rank


def read_config(directory: Path) -> AdapterConfig:
    """Raises `AdapterRefusedError`: no adapter, no LoRA, or something that is not applied."""
    if not directory.is_dir():
        raise AdapterRefusedError(
            f"{directory} is not a directory. Give a directory with a PEFT adapter.", reason="missing_directory"
        )
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise AdapterRefusedError(f"{directory} has no {CONFIG_FILE}: not a PEFT adapter.", reason="not_peft")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(path, f"cannot be read as JSON: {error}.", "bad_config") from error
    if not isinstance(fields, dict):
        raise _refused(path, f"holds {type(fields).__name__}, not a JSON object.", "bad_config")
    if fields.get("peft_type") != "LORA":
        raise _refused(
            path, f"has peft_type {fields.get('peft_type')!r}; only LORA is served.", "unsupported_peft_type"
        )
    _check_features(path, fields)
    name = fields.get("base_model_name_or_path")
    return AdapterConfig(
        base_model_name=name if isinstance(name, str) else None,
        lora_rank=_rank(path, "r", fields.get("r")),
        lora_alpha=_alpha(path, "lora_alpha", fields.get("lora_alpha")),
        use_rslora=bool(fields.get("use_rslora")),
        use_dora=bool(fields.get("use_dora")),
        lora_bias=bool(fields.get("lora_bias")),
        trains_bias=_trains_bias(path, fields.get("bias", "none")),
        rank_pattern=tuple(
            (_compiled(path, "rank_pattern", key), _rank(path, f"rank_pattern[{key!r}]", value))
            for key, value in _pattern(path, fields, "rank_pattern").items()
        ),
        alpha_pattern=tuple(
            (_compiled(path, "alpha_pattern", key), _alpha(path, f"alpha_pattern[{key!r}]", value))
            for key, value in _pattern(path, fields, "alpha_pattern").items()
        ),
        modules_to_save=_names(path, "modules_to_save", fields.get("modules_to_save") or []),
        trainable_tokens=_trainable_tokens(path, fields.get("trainable_token_indices") or {}),
        ensure_weight_tying=bool(fields.get("ensure_weight_tying")),
        invocation_tokens=_token_ids(path, "alora_invocation_tokens", fields.get("alora_invocation_tokens") or []),
    )


def _check_features(path: Path, fields: Mapping[str, Any]) -> None:
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise _refused(
            path,
            f"has init_lora_weights {init!r}, which changes the base weights. Convert it to a plain LoRA with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...).",
            "unsupported_feature",
        )
    for name, value in fields.items():
        if name in _NEUTRAL or name in _APPLIED or not value:
            continue
        raise _refused(path, f"asks for {name}={value!r}, which is not supported (yet).", "unsupported_feature")


def _trains_bias(path: Path, value: Any) -> bool:
    if value not in ("none", "all", "lora_only"):
        raise _refused(path, f"has bias={value!r}; it must be none, all or lora_only.", "bad_config")
    return bool(value != "none")


def _rank(path: Path, name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise _refused(path, f"has {name}={value!r}; it must be a positive integer.", "bad_config")
    return value


def _alpha(path: Path, name: str, value: Any) -> float:
    # JSON as Python reads it has NaN, Infinity and integers beyond any float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise _refused(path, f"has {name}={value!r}; it must be a finite number (float32).", "bad_config")
    return float(value)


def _pattern(path: Path, fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    pattern = fields.get(name) or {}
    if not isinstance(pattern, dict):
        raise _refused(path, f"has {name}={pattern!r}; it must be an object of module names.", "bad_config")
    return pattern


def _names(path: Path, name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
        raise _refused(path, f"has {name}={value!r}; it must be a list of module names.", "bad_config")
    return tuple(value)


def _token_ids(path: Path, name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(token_id) is int and token_id >= 0 for token_id in value):
        raise _refused(path, f"has {name}={value!r}; it must be a list of token ids.", "bad_config")
    return tuple(value)


def _trainable_tokens(path: Path, value: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """A list alone is of the embedding."""
    by_module = {"embed_tokens": value} if isinstance(value, list) else value
    if not isinstance(by_module, dict):
        raise _refused(path, f"has trainable_token_indices={value!r}; it must be a list or an object.", "bad_config")
    for module, ids in by_module.items():
        usable = isinstance(ids, list) and all(type(token_id) is int and token_id >= 0 for token_id in ids)
        if not module or not usable or len(set(ids)) < len(ids):
            raise _refused(
                path,
                f"has trainable_token_indices={ids!r} for {module!r}; they must be different token ids.",
                "bad_config",
            )
    return tuple((module, tuple(ids)) for module, ids in by_module.items() if ids)


def _compiled(path: Path, name: str, key: str) -> re.Pattern[str]:
    """A key names modules by their ends: by whole names between dots, or as a regular expression."""
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise _refused(path, f"has {name} for {key!r}, no regular expression: {error}.", "bad_config") from error


def _refused(path: Path, what: str, reason: str) -> AdapterRefusedError:
    return AdapterRefusedError(f"{path} {what}", reason=reason)
