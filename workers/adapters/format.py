"""A PEFT LoRA directory, checked and turned into what a slot can hold.

Strict: what an adapter asks for is applied in full or refused with a reason. Which linears an adapter changes is read
off its tensors; its config says how much, and whether it asks for anything else. Only safetensors is read.

Owns: the format, its refusals, reading the weights. Leaves to others: finding the directory (sources.py), keeping
loaded adapters (store.py), slots (model/lora.py).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lorafleet.workers.adapters.digest import AdapterHash
from lorafleet.workers.errors import AdapterRefusedError, AdapterUnavailableError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Fields of PEFT's LoraConfig that say how the adapter was made or which modules it touches (its tensors tell that), and
# change nothing of what it computes.
_NEUTRAL = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
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
_APPLIED = frozenset(["peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights"])
# Initialisations that rewrite the base weights, on which the adapter then relies.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_TENSOR = re.compile(
    r"(?:base_model\.model\.)?model\.layers\.(?P<layer>[0-9]+)\."
    r"(?:self_attn\.(?=[qkvo]_proj\.)|mlp\.(?=(?:gate|up|down)_proj\.))(?P<linear>\w+)"
    r"\.lora_(?P<side>[AB])(?:\.(?P<name>[^.]+))?\.weight"
)


@dataclass(frozen=True, slots=True)
class BaseShapes:
    """What an adapter must fit: (in features, out features) of each linear of a decoder layer, by checkpoint name."""

    num_layers: int
    linears: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A verified adapter on disk; enough to load it again. Small, since thousands are kept."""

    digest: str  # identity: config fields that matter, and the tensors' bytes
    path: Path
    lora_rank: int
    scaling: float
    num_elements: int
    base_model_name: str | None


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter's weights in host memory of their own. (layer, linear) → (A [rank, in], B [out, rank])."""

    digest: str
    scaling: float
    weights: Mapping[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
    num_bytes: int


def read_spec(path: Path, base: BaseShapes, *, max_lora_rank: int) -> AdapterSpec:
    """Read and verify an adapter, weights included. Raises `AdapterRefusedError` with a reason code."""
    config = _read_config(path)
    scaling = _scaling(path, config)
    lora_rank = config["r"]
    if lora_rank > max_lora_rank:
        raise _refused(
            path / CONFIG_FILE,
            f"has rank {lora_rank}, the limit is {max_lora_rank}. Start with --max-lora-rank {lora_rank}.",
            "rank_too_large",
        )
    adapter_hash = AdapterHash(lora_rank=lora_rank, scaling=scaling)
    num_elements = 0
    for layer, linear, side, tensor in _read_tensors(path, base, lora_rank):
        if not bool(torch.isfinite(tensor).all()):
            raise _refused(
                path / WEIGHTS_FILE,
                f"has NaN or infinite values in lora_{side} of layer {layer} {linear}. Train or save it again.",
                "non_finite",
            )
        adapter_hash.add(layer, linear, side, tensor)
        num_elements += tensor.numel()
    return AdapterSpec(
        digest=adapter_hash.hexdigest(),
        path=path,
        lora_rank=lora_rank,
        scaling=scaling,
        num_elements=num_elements,
        base_model_name=config.get("base_model_name_or_path"),
    )


def load_adapter(spec: AdapterSpec, base: BaseShapes, dtype: torch.dtype) -> HostAdapter:
    """Read a verified adapter's weights into memory of their own, in `dtype`.

    Raises `AdapterUnavailableError` when the files are gone or are not what was verified, `AdapterRefusedError` when
    values overflow in `dtype`.
    """
    adapter_hash = AdapterHash(lora_rank=spec.lora_rank, scaling=spec.scaling)
    weights: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    try:
        for layer, linear, side, tensor in _read_tensors(spec.path, base, spec.lora_rank):
            adapter_hash.add(layer, linear, side, tensor)
            converted = tensor.to(dtype, copy=True)
            if not bool(torch.isfinite(converted).all()):
                raise _refused(
                    spec.path / WEIGHTS_FILE,
                    f"overflows in {dtype} in lora_{side} of layer {layer} {linear}. Use --lora-dtype bfloat16.",
                    "non_finite",
                )
            weights.setdefault((layer, linear), {})[side] = converted
    except AdapterRefusedError as error:
        if error.reason == "non_finite":
            raise
        raise AdapterUnavailableError(f"{error.message} It was fine when it was registered.", param="model") from error
    if adapter_hash.hexdigest() != spec.digest:
        raise AdapterUnavailableError(
            f"{spec.path} changed since it was registered; register it again to serve the new version.", param="model"
        )
    return HostAdapter(
        digest=spec.digest,
        scaling=spec.scaling,
        weights={key: (sides["A"], sides["B"]) for key, sides in weights.items()},
        num_bytes=spec.num_elements * dtype.itemsize,
    )


def _refused(where: Path, what: str, reason: str) -> AdapterRefusedError:
    return AdapterRefusedError(f"{where} {what}", reason=reason)


def _read_config(path: Path) -> dict[str, Any]:
    """The config's fields, checked: everything in it is applied, neutral or refused."""
    if not path.is_dir():
        raise _refused(path, "is not a directory. Give a directory with a PEFT adapter.", "missing_directory")
    config_path = path / CONFIG_FILE
    if not config_path.is_file():
        raise _refused(path, f"has no {CONFIG_FILE}: not a PEFT adapter.", "not_peft")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(config_path, f"cannot be read as JSON: {error}.", "bad_config") from error
    if not isinstance(config, dict):
        raise _refused(config_path, f"holds {type(config).__name__}, not a JSON object.", "bad_config")
    if config.get("peft_type") != "LORA":
        raise _refused(
            config_path, f"has peft_type {config.get('peft_type')!r}; only LORA is served.", "unsupported_peft_type"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise _refused(
            config_path,
            f"has init_lora_weights {init!r}, which changes the base weights. Convert it to a plain LoRA with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...).",
            "unsupported_feature",
        )
    for name, value in config.items():
        if name in _NEUTRAL or name in _APPLIED or not value or (name == "bias" and value == "none"):
            continue
        raise _refused(config_path, f"asks for {name}={value!r}, which is not supported (yet).", "unsupported_feature")
    return config


def _scaling(path: Path, config: Mapping[str, Any]) -> float:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise _refused(path / CONFIG_FILE, f"has r={rank!r}; it must be a positive integer.", "bad_config")
    # JSON as Python reads it has NaN, Infinity and integers beyond any float.
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
        raise _refused(path / CONFIG_FILE, f"has lora_alpha={alpha!r}; it must be a finite number.", "bad_config")
    # rsLoRA: Kalajdzievski 2023.
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def _read_tensors(path: Path, base: BaseShapes, lora_rank: int) -> Iterator[tuple[int, str, str, torch.Tensor]]:
    """(layer, linear, "A" or "B", tensor), in canonical order; all names and shapes are checked before the first."""
    weights_path = path / WEIGHTS_FILE
    if not weights_path.is_file():
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        if pickles:
            raise _refused(
                path / pickles[0],
                "is a pickle, which is never read since it can run code. Save the adapter with safetensors.",
                "pickle",
            )
        raise _refused(path, f"has no {WEIGHTS_FILE}.", "missing_weights")
    extra = sorted(file.name for file in path.glob("new_embeddings*"))
    if extra:
        raise _refused(
            path / extra[0], "carries added embeddings, which are not supported (yet).", "unsupported_feature"
        )
    try:
        with safe_open(weights_path, framework="pt") as opened:
            names = _names(weights_path, list(opened.keys()), base)
            for (_, linear, side), name in names:
                shape = opened.get_slice(name).get_shape()
                _check_shape(weights_path, name, side, shape, base.linears[linear], lora_rank)
            for (layer, linear, side), name in names:
                tensor = opened.get_tensor(name)
                if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                    raise _refused(
                        weights_path,
                        f"has {name} in {tensor.dtype}; float32, float16 and bfloat16 are read.",
                        "unsupported_dtype",
                    )
                yield layer, linear, side, tensor
    except (SafetensorError, OSError) as error:
        if _is_pickle(weights_path):
            raise _refused(weights_path, "is a pickle under another name, which is never read.", "pickle") from error
        raise _refused(weights_path, f"cannot be read as safetensors: {error}.", "bad_safetensors") from error


def _is_pickle(path: Path) -> bool:
    """By its first bytes: torch's zip, or a bare pickle. False for what cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(2)
    except OSError:
        return False
    return head == b"PK" or head[:1] == b"\x80"


def _names(weights_path: Path, names: list[str], base: BaseShapes) -> list[tuple[tuple[int, str, str], str]]:
    """Tensor names by what they are. Everything in the file must be an A or a B of a linear that the base has."""
    found: dict[tuple[int, str, str], str] = {}
    for name in names:
        match = _TENSOR.fullmatch(name)
        if match is None or match["linear"] not in base.linears:
            raise _refused(
                weights_path,
                f"has the tensor {name}; supported is LoRA on the decoder layers' {', '.join(base.linears)}.",
                "unsupported_target",
            )
        layer = int(match["layer"])
        if layer >= base.num_layers:
            raise _refused(
                weights_path,
                f"has {name}, the base model has {base.num_layers} layers. Was it trained for another base model?",
                "unknown_layer",
            )
        key = (layer, match["linear"], match["side"])
        if key in found:
            raise _refused(weights_path, f"has two tensors for one place: {found[key]} and {name}.", "bad_safetensors")
        found[key] = name
    if not found:
        raise _refused(weights_path, "holds no LoRA weights.", "no_weights")
    for layer, linear, side in found:
        other = "B" if side == "A" else "A"
        if (layer, linear, other) not in found:
            raise _refused(
                weights_path, f"has lora_{side} of layer {layer} {linear} without lora_{other}.", "missing_pair"
            )
    return sorted(found.items())


def _check_shape(
    weights_path: Path, name: str, side: str, shape: list[int], base: tuple[int, int], lora_rank: int
) -> None:
    num_in, num_out = base
    expected = [lora_rank, num_in] if side == "A" else [num_out, lora_rank]
    if shape == expected:
        return
    if len(shape) == 2 and shape[1 if side == "A" else 0] == expected[1 if side == "A" else 0]:
        raise _refused(
            weights_path, f"has {name} of shape {shape}; {CONFIG_FILE} says r={lora_rank}: {expected}.", "rank_mismatch"
        )
    raise _refused(
        weights_path,
        f"has {name} of shape {shape}; the base model wants {expected}. Was it trained for another base model?",
        "wrong_shape",
    )
