"""A PEFT LoRA directory, checked and turned into what a slot can hold.

Strict: what an adapter asks for is applied in full or refused with a reason. Which linears an adapter changes is read
off its tensors; its config says how much, and whether it asks for anything else. Only safetensors is read.

Owns: the format, its refusals, reading the weights. Leaves to others: finding the directory (sources.py), keeping
loaded adapters (store.py), slots (model/lora.py).
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from lorafleet.workers.adapters.digest import AdapterHash, FileStamp
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

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

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
    stamp: FileStamp | None = None  # of the weights file that was hashed; None: nothing vouches for it, hash again


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter's weights in host memory of their own. (layer, linear) → (A [rank, in], B [rank, out]), contiguous.

    B is turned already, as the slots want it: filling a slot only copies rows.
    """

    digest: str
    scaling: float
    weights: Mapping[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
    num_bytes: int


def read_spec(path: Path, base: BaseShapes, *, max_lora_rank: int) -> AdapterSpec:
    """Read and verify an adapter, weights included. Raises `AdapterRefusedError` with a reason code.

    Takes 20 ms longer for a file that has just been written, see `FileStamp.settle`.
    """
    config = _read_config(path)
    scaling = _scaling(path, config)
    lora_rank = config["r"]
    if lora_rank > max_lora_rank:
        raise _refused(
            path / CONFIG_FILE,
            f"has rank {lora_rank}, the limit is {max_lora_rank}. Start with --max-lora-rank {lora_rank}.",
            "rank_too_large",
        )
    weights = _read_weights(path, base, lora_rank, settle=True)
    if weights.changed:
        raise _refused(
            path / WEIGHTS_FILE, "changed while it was read. Register it when it is complete.", "changed_while_read"
        )
    for layer, linear, side, tensor in weights.tensors:
        if not _is_finite(tensor):
            raise _refused(
                path / WEIGHTS_FILE,
                f"has NaN or infinite values in lora_{side} of layer {layer} {linear}. Train or save it again.",
                "non_finite",
            )
    return AdapterSpec(
        digest=_digest(weights, lora_rank, scaling),
        path=path,
        lora_rank=lora_rank,
        scaling=scaling,
        num_elements=sum(tensor.numel() for *_, tensor in weights.tensors),
        base_model_name=config.get("base_model_name_or_path"),
        stamp=weights.stamp,
    )


def load_adapter(spec: AdapterSpec, base: BaseShapes, dtype: torch.dtype) -> HostAdapter:
    """Read a verified adapter's weights into memory of their own, in `dtype`.

    Hashes them only where the file's stamp does not prove that they are what was verified. Raises
    `AdapterUnavailableError` when the files are gone or are not what was verified, `AdapterRefusedError` when values
    overflow in `dtype`.
    """
    try:
        weights = _read_weights(spec.path, base, spec.lora_rank)
    except AdapterRefusedError as error:
        raise AdapterUnavailableError(f"{error.message} It was fine when it was registered.", param="model") from error
    proven = weights.stamp is not None and weights.stamp == spec.stamp and not weights.changed
    if not proven and _digest(weights, spec.lora_rank, spec.scaling) != spec.digest:
        raise AdapterUnavailableError(
            f"{spec.path} changed since it was registered; register it again to serve the new version.", param="model"
        )
    # What was verified is finite, so only a smaller range can make it otherwise.
    wider = {other for other in _DTYPES.values() if torch.finfo(other).max > torch.finfo(dtype).max}
    kept: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for (layer, linear, side, stored), tensor in zip(weights.tensors, _in_dtype(weights, dtype), strict=True):
        if stored.dtype in wider and not _is_finite(tensor):
            raise _refused(
                spec.path / WEIGHTS_FILE,
                f"overflows in {dtype} in lora_{side} of layer {layer} {linear}. Use --lora-dtype bfloat16.",
                "non_finite",
            )
        kept.setdefault((layer, linear), {})[side] = tensor if side == "A" else _turned_in_place(tensor)
    return HostAdapter(
        digest=spec.digest,
        scaling=spec.scaling,
        weights={key: (sides["A"], sides["B"]) for key, sides in kept.items()},
        num_bytes=spec.num_elements * dtype.itemsize,
    )


@dataclass(frozen=True, slots=True)
class _Weights:
    """What one read of the weights file gave."""

    tensors: list[tuple[int, str, str, torch.Tensor]]  # (layer, linear, "A" or "B", weights), in canonical order
    stamp: FileStamp | None  # None: it proves nothing
    changed: bool  # while it was read


def _digest(weights: _Weights, lora_rank: int, scaling: float) -> str:
    adapter_hash = AdapterHash(lora_rank=lora_rank, scaling=scaling)
    for layer, linear, side, tensor in weights.tensors:
        adapter_hash.add(layer, linear, side, tensor)
    return adapter_hash.hexdigest()


def _is_finite(tensor: torch.Tensor) -> bool:
    # A sum is finite only if all its terms are, and takes a twentieth of looking at each; it may overflow, though.
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(torch.isfinite(tensor).all())


def _in_dtype(weights: _Weights, dtype: torch.dtype) -> list[torch.Tensor]:
    """The tensors themselves if all are in `dtype`, else converted into one new buffer."""
    tensors = [tensor for *_, tensor in weights.tensors]
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    sizes = [tensor.numel() for tensor in tensors]
    parts = torch.empty(sum(sizes), dtype=dtype).split(sizes)
    return [part.view(tensor.shape).copy_(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def _turned_in_place(b_OR: torch.Tensor) -> torch.Tensor:
    """B as [R, O], in the same memory."""
    # As integers, by numpy: it knows no bfloat16, and turns so small matrices several times faster than torch.
    words_OR = b_OR.view(torch.int32 if b_OR.itemsize == 4 else torch.int16).numpy()
    words_OR.reshape(-1)[:] = words_OR.T.ravel()
    return b_OR.view(b_OR.shape[1], b_OR.shape[0])


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


def _read_weights(path: Path, base: BaseShapes, lora_rank: int, *, settle: bool = False) -> _Weights:
    """Read the weights file once, into one buffer of our own, of which the tensors are views.

    Names, shapes and dtypes are checked before that. `settle`: the stamp is to be proof of what is read.
    """
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
        with weights_path.open("rb") as file:
            stamp = FileStamp.of(file)
            proof = stamp if not settle or stamp.settle() else None
            places, num_bytes = _places(weights_path, file.fileno(), base, lora_rank)
            # No gaps, says the library: the last tensor ends where the file does.
            file.seek(-num_bytes, os.SEEK_END)
            data = torch.empty(-(-num_bytes // 4) * 4, dtype=torch.uint8)  # whole elements of any dtype
            if file.readinto(data[:num_bytes].numpy().data) != num_bytes:
                raise OSError("it ends early")
            changed = FileStamp.of(file) != stamp
    except (SafetensorError, OSError) as error:
        if _is_pickle(weights_path):
            raise _refused(weights_path, "is a pickle under another name, which is never read.", "pickle") from error
        raise _refused(weights_path, f"cannot be read as safetensors: {error}.", "bad_safetensors") from error
    return _Weights(_views(data, places), proof, changed)


class _Place(NamedTuple):
    """Where a tensor's bytes begin behind the header, and what they are. Sorts canonically."""

    layer: int
    linear: str
    side: str
    start: int
    dtype: torch.dtype
    shape: tuple[int, int]


def _views(data: torch.Tensor, places: list[_Place]) -> list[tuple[int, str, str, torch.Tensor]]:
    elements = {dtype: data.view(dtype) for dtype in _DTYPES.values()}
    views = []
    for layer, linear, side, start, dtype, shape in places:
        if start % dtype.itemsize == 0:
            tensor = elements[dtype].as_strided(shape, (shape[1], 1), start // dtype.itemsize)
        else:  # possible where dtypes are mixed
            stop = start + shape[0] * shape[1] * dtype.itemsize
            tensor = data[start:stop].clone().view(dtype).view(shape)
        views.append((layer, linear, side, tensor))
    return views


def _places(weights_path: Path, descriptor: int, base: BaseShapes, lora_rank: int) -> tuple[list[_Place], int]:
    """Where the tensors are, in canonical order, and the bytes of all; everything in the header is checked."""
    # By its descriptor: the path may lead to another file by now. pread: a mapped file that shrinks kills the process.
    with safe_open(f"/dev/fd/{descriptor}", framework="pt", backend="pread") as header:
        in_file_order = header.offset_keys()
        keys = _keys(weights_path, sorted(in_file_order), base)
        slices = {name: header.get_slice(name) for name in in_file_order}
        shapes = {name: slices[name].get_shape() for name in in_file_order}
        for name, (_, linear, side) in keys.items():
            _check_shape(weights_path, name, side, shapes[name], base.linears[linear], lora_rank)
        dtypes = {name: _DTYPES.get(slices[name].get_dtype()) for name in keys}
        for name, dtype in dtypes.items():
            if dtype is None:
                raise _refused(
                    weights_path,
                    f"has {name} in {header.get_tensor(name).dtype}; float32, float16 and bfloat16 are read.",
                    "unsupported_dtype",
                )
    places = []
    start = 0
    for name in in_file_order:
        dtype, shape = dtypes[name], shapes[name]
        assert dtype is not None
        places.append(_Place(*keys[name], start, dtype, (shape[0], shape[1])))
        start += shape[0] * shape[1] * dtype.itemsize
    return sorted(places), start


def _is_pickle(path: Path) -> bool:
    """By its first bytes: torch's zip, or a bare pickle. False for what cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(2)
    except OSError:
        return False
    return head == b"PK" or head[:1] == b"\x80"


def _keys(weights_path: Path, names: list[str], base: BaseShapes) -> dict[str, tuple[int, str, str]]:
    """What each name is, in canonical order. All must be an A or a B of a linear that the base has."""
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
    return {name: key for key, name in sorted(found.items())}


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
