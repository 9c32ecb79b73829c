"""A PEFT LoRA directory, checked and turned into what a slot can hold.

Strict: what an adapter asks for is applied in full or refused with a reason. Which linears an adapter changes is read
off its tensors, how much is said by its config (config.py). Only safetensors is read.

Owns: the format of the weights, its refusals, reading them. Leaves to others: finding the directory (sources.py),
keeping loaded adapters (store.py), slots (model/lora.py).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from lorafleet.workers.adapters.config import CONFIG_FILE, AdapterConfig, read_config
from lorafleet.workers.adapters.digest import AdapterHash, FileStamp
from lorafleet.workers.errors import AdapterRefusedError, AdapterUnavailableError

WEIGHTS_FILE = "adapter_model.safetensors"

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Where a decoder layer keeps its linears, by checkpoint name.
_PARENTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj", "gate_up_proj"), "mlp"),
}
# Of adapters that were trained on fused linears: the parts share A, and B has their rows in this order.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

_TENSOR = re.compile(
    r"(?:base_model\.model\.)?model\.layers\.(?P<layer>[0-9]+)\.(?P<parent>self_attn|mlp)\.(?P<linear>\w+)\."
    r"(?:(?P<A>lora_A(?:\.[^.]+)?\.weight)|(?P<B>lora_B(?:\.[^.]+)?\.weight)|(?P<B_bias>lora_B(?:\.[^.]+)?\.bias)"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?)|(?P<bias>(?:base_layer\.)?bias))"
)
_VECTORS = ("B_bias", "bias", "magnitude")  # one value an output
_SIDES = ("A", "B", *_VECTORS)
_SIDE_NAMES = {
    "A": "lora_A",
    "B": "lora_B",
    "B_bias": "the bias of lora_B",
    "bias": "the bias",
    "magnitude": "lora_magnitude_vector",
}


@dataclass(frozen=True, slots=True)
class BaseShapes:
    """What an adapter must fit: (in features, out features) of each linear of a decoder layer, by checkpoint name."""

    num_layers: int
    linears: Mapping[str, tuple[int, int]]

    def of(self, linear: str) -> tuple[int, int] | None:
        """Of a linear or of several fused into one; None if the model has none such."""
        parts = [self.linears.get(part) for part in _FUSED.get(linear, (linear,))]
        known = [part for part in parts if part is not None]
        return (known[0][0], sum(num_out for _, num_out in known)) if len(known) == len(parts) else None


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A verified adapter on disk; enough to load it again. Small, since thousands are kept."""

    digest: str  # identity: the tensors' bytes, and what the config makes of them
    path: Path
    config: AdapterConfig
    lora_rank: int  # the highest of its modules
    num_elements: int  # of A and B
    num_vector_elements: int = 0  # of biases and magnitudes
    stamp: FileStamp | None = None  # of the weights file that was hashed; None: nothing vouches for it, hash again

    def num_bytes(self, dtype: torch.dtype) -> int:
        """In host memory: A and B in `dtype`; vectors as they were read, in float32, and norms as long as they."""
        return self.num_elements * dtype.itemsize + self.num_vector_elements * 12


class LinearChange(NamedTuple):
    """What an adapter does to one linear. B is turned already, as slots want it: filling one only copies rows."""

    a_RI: torch.Tensor  # R is 0 where only the bias is the adapter's
    b_RO: torch.Tensor
    scaling: float
    b_bias_O: torch.Tensor | None = None  # float32, as all vectors: added to (A·x)·B before the scaling
    bias_O: torch.Tensor | None = None  # in place of the base model's
    magnitude_O: torch.Tensor | None = None  # DoRA's


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter's weights in host memory of their own, by (layer, linear)."""

    digest: str
    weights: Mapping[tuple[int, str], LinearChange]
    num_bytes: int
    # DoRA's, of the rows of W + s·B·A. They take the base's weights, so the first slot that is filled finds them.
    norms: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)


def read_spec(path: Path, base: BaseShapes, *, max_lora_rank: int) -> AdapterSpec:
    """Read and verify an adapter, weights included. Raises `AdapterRefusedError` with a reason code.

    Takes 20 ms longer for a file that has just been written, see `FileStamp.settle`.
    """
    config = read_config(path)
    weights = _read_weights(path, base, config, max_lora_rank, settle=True)
    if weights.changed:
        raise _refused(
            path / WEIGHTS_FILE, "changed while it was read. Register it when it is complete.", "changed_while_read"
        )
    for layer, linear, side, tensor in weights.tensors:
        if not _is_finite(tensor):
            raise _refused(
                path / WEIGHTS_FILE,
                f"has NaN or infinite values in {_SIDE_NAMES[side]} of layer {layer} {linear}. Train or save it again.",
                "non_finite",
            )
    return AdapterSpec(
        digest=_digest(weights, config),
        path=path,
        config=config,
        lora_rank=max(tensor.shape[0] for _, _, side, tensor in weights.tensors if side == "A"),
        num_elements=sum(tensor.numel() for _, _, side, tensor in weights.tensors if side not in _VECTORS),
        num_vector_elements=sum(tensor.numel() for _, _, side, tensor in weights.tensors if side in _VECTORS),
        stamp=weights.stamp,
    )


def load_adapter(spec: AdapterSpec, base: BaseShapes, dtype: torch.dtype) -> HostAdapter:
    """Read a verified adapter's weights into memory of their own, in `dtype`.

    Hashes them only where the file's stamp does not prove that they are what was verified. Raises
    `AdapterUnavailableError` when the files are gone or are not what was verified, `AdapterRefusedError` when values
    overflow in `dtype`.
    """
    try:
        weights = _read_weights(spec.path, base, spec.config)
    except AdapterRefusedError as error:
        raise AdapterUnavailableError(f"{error.message} It was fine when it was registered.", param="model") from error
    proven = weights.stamp is not None and weights.stamp == spec.stamp and not weights.changed
    if not proven and _digest(weights, spec.config) != spec.digest:
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
                f"overflows in {dtype} in {_SIDE_NAMES[side]} of layer {layer} {linear}. Use --lora-dtype bfloat16.",
                "non_finite",
            )
        kept.setdefault((layer, linear), {})[side] = _turned_in_place(tensor) if side == "B" else tensor
    changes: dict[tuple[int, str], LinearChange] = {}
    for (layer, linear), sides in kept.items():
        changes |= _split(layer, linear, sides, spec.config.scaling(_module(layer, linear)), base, dtype)
    return HostAdapter(digest=spec.digest, weights=changes, num_bytes=spec.num_bytes(dtype))


def _split(
    layer: int, linear: str, sides: Mapping[str, torch.Tensor], scaling: float, base: BaseShapes, dtype: torch.dtype
) -> dict[tuple[int, str], LinearChange]:
    """By the linears that a module is made of; most are made of themselves."""
    parts = _FUSED.get(linear, (linear,))
    num_in, num_out = base.linears[parts[0]][0], sum(base.linears[part][1] for part in parts)
    nothing = {"A": torch.empty(0, num_in, dtype=dtype), "B": torch.empty(0, num_out, dtype=dtype)}
    a_RI, b_RO = (sides.get(side, none) for side, none in nothing.items())
    changes, begin = {}, 0
    for part in parts:
        end = begin + base.linears[part][1]
        vectors = [sides[name][begin:end] if name in sides else None for name in _VECTORS]
        changes[layer, part] = LinearChange(a_RI, b_RO[:, begin:end], scaling, *vectors)
        begin = end
    return changes


@dataclass(frozen=True, slots=True)
class _Weights:
    """What one read of the weights file gave."""

    tensors: list[tuple[int, str, str, torch.Tensor]]  # (layer, linear, side, weights), in canonical order
    stamp: FileStamp | None  # None: it proves nothing
    changed: bool  # while it was read


def _digest(weights: _Weights, config: AdapterConfig) -> str:
    adapter_hash = AdapterHash()
    for layer, linear, side, tensor in weights.tensors:
        adapter_hash.add(layer, linear, side, config.scaling(_module(layer, linear)), tensor)
    return adapter_hash.hexdigest()


def _module(layer: int, linear: str) -> str:
    """As the base model names it, and as patterns in configs mean it."""
    return f"model.layers.{layer}.{_PARENTS[linear]}.{linear}"


def _is_finite(tensor: torch.Tensor) -> bool:
    # A sum is finite only if all its terms are, and takes a twentieth of looking at each; it may overflow, though.
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(torch.isfinite(tensor).all())


def _in_dtype(weights: _Weights, dtype: torch.dtype) -> list[torch.Tensor]:
    """The matrices themselves if all are in `dtype`, else converted into one new buffer. Vectors become float32."""
    matrices = [tensor for _, _, side, tensor in weights.tensors if side not in _VECTORS]
    if any(tensor.dtype != dtype for tensor in matrices):
        sizes = [tensor.numel() for tensor in matrices]
        parts = torch.empty(sum(sizes), dtype=dtype).split(sizes)
        matrices = [part.view(tensor.shape).copy_(tensor) for part, tensor in zip(parts, matrices, strict=True)]
    rest = iter(matrices)
    return [tensor.float() if side in _VECTORS else next(rest) for _, _, side, tensor in weights.tensors]


def _turned_in_place(b_OR: torch.Tensor) -> torch.Tensor:
    """B as [R, O], in the same memory."""
    # As integers, by numpy: it knows no bfloat16, and turns so small matrices several times faster than torch.
    words_OR = b_OR.view(torch.int32 if b_OR.itemsize == 4 else torch.int16).numpy()
    words_OR.reshape(-1)[:] = words_OR.T.ravel()
    return b_OR.view(b_OR.shape[1], b_OR.shape[0])


def _refused(where: Path, what: str, reason: str) -> AdapterRefusedError:
    return AdapterRefusedError(f"{where} {what}", reason=reason)


def _read_weights(
    path: Path, base: BaseShapes, config: AdapterConfig, max_lora_rank: int | None = None, *, settle: bool = False
) -> _Weights:
    """Read the weights file once, into one buffer of our own, of which the tensors are views.

    Names, shapes, ranks and dtypes are checked before that. `settle`: the stamp is to be proof of what is read.
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
            places, num_bytes = _places(weights_path, file.fileno(), base, config, max_lora_rank)
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
    shape: tuple[int, ...]


def _views(data: torch.Tensor, places: list[_Place]) -> list[tuple[int, str, str, torch.Tensor]]:
    elements = {dtype: data.view(dtype) for dtype in _DTYPES.values()}
    views = []
    for layer, linear, side, start, dtype, shape in places:
        if start % dtype.itemsize == 0:
            strides = (shape[1], 1) if len(shape) == 2 else (1,)
            tensor = elements[dtype].as_strided(shape, strides, start // dtype.itemsize)
        else:  # possible where dtypes are mixed
            stop = start + math.prod(shape) * dtype.itemsize
            tensor = data[start:stop].clone().view(dtype).view(shape)
        views.append((layer, linear, side, tensor))
    return views


def _places(
    weights_path: Path, descriptor: int, base: BaseShapes, config: AdapterConfig, max_lora_rank: int | None
) -> tuple[list[_Place], int]:
    """Where the tensors are, in canonical order, and the bytes of all; everything in the header is checked."""
    # By its descriptor: the path may lead to another file by now. pread: a mapped file that shrinks kills the process.
    with safe_open(f"/dev/fd/{descriptor}", framework="pt", backend="pread") as header:
        in_file_order = header.offset_keys()
        keys = _keys(weights_path, sorted(in_file_order), base, config)
        slices = {name: header.get_slice(name) for name in in_file_order}
        shapes = {name: slices[name].get_shape() for name in in_file_order}
        for name, (layer, linear, side) in keys.items():
            shape, lora_rank = base.of(linear), config.rank(_module(layer, linear))
            assert shape is not None
            if max_lora_rank is not None and lora_rank > max_lora_rank:
                raise _refused(
                    weights_path.with_name(CONFIG_FILE),
                    f"has rank {lora_rank}, the limit is {max_lora_rank} ({_module(layer, linear)}). Start with "
                    f"--max-lora-rank {lora_rank}.",
                    "rank_too_large",
                )
            _check_shape(weights_path, name, side, shapes[name], shape, lora_rank)
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
        places.append(_Place(*keys[name], start, dtype, tuple(shape)))
        start += math.prod(shape) * dtype.itemsize
    return sorted(places), start


def _is_pickle(path: Path) -> bool:
    """By its first bytes: torch's zip, or a bare pickle. False for what cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(2)
    except OSError:
        return False
    return head == b"PK" or head[:1] == b"\x80"


def _keys(
    weights_path: Path, names: list[str], base: BaseShapes, config: AdapterConfig
) -> dict[str, tuple[int, str, str]]:
    """What each name is, in canonical order. All must be of linears that the base has, and as the config says."""
    found: dict[tuple[int, str, str], str] = {}
    for name in names:
        match = _TENSOR.fullmatch(name)
        if match is None or _PARENTS.get(match["linear"]) != match["parent"] or base.of(match["linear"]) is None:
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
        key = (layer, match["linear"], str(match.lastgroup))
        if key in found:
            raise _refused(weights_path, f"has two tensors for one place: {found[key]} and {name}.", "bad_safetensors")
        found[key] = name
    if not any(side == "A" for _, _, side in found):
        raise _refused(weights_path, "holds no LoRA weights.", "no_weights")
    for layer, linear in dict.fromkeys((layer, linear) for layer, linear, _ in found):
        _check_module(weights_path, layer, linear, {side for side in _SIDES if (layer, linear, side) in found}, config)
        for part in _FUSED.get(linear, ()):
            if any((layer, part, side) in found for side in _SIDES):
                raise _refused(
                    weights_path,
                    f"has LoRA on {linear} and on {part} of layer {layer}, which is a part of it.",
                    "overlapping_targets",
                )
    return {name: key for key, name in sorted(found.items())}


def _check_module(weights_path: Path, layer: int, linear: str, sides: set[str], config: AdapterConfig) -> None:
    """A module has the tensors that the config asks for, and no others."""
    where = f"layer {layer} {linear}"
    for side, other in (("A", "B"), ("B", "A")):
        if side in sides and other not in sides:
            raise _refused(weights_path, f"has lora_{side} of {where} without lora_{other}.", "missing_pair")
    for side, option, is_asked in (
        ("magnitude", "use_dora", config.use_dora and "A" in sides),
        ("B_bias", "lora_bias", config.lora_bias and "A" in sides),
        ("bias", "bias", config.trains_bias),
    ):
        if side in sides and not is_asked:
            raise _refused(
                weights_path,
                f"has {_SIDE_NAMES[side]} of {where}, but {CONFIG_FILE} does not ask for it with {option}.",
                "config_mismatch",
            )
        # A bias of its own has a module only where the base model has one.
        if is_asked and side not in sides and side != "bias":
            raise _refused(
                weights_path,
                f"lacks {_SIDE_NAMES[side]} of {where}, which {CONFIG_FILE} asks for with {option}.",
                "config_mismatch",
            )


def _check_shape(
    weights_path: Path, name: str, side: str, shape: list[int], base: tuple[int, int], lora_rank: int
) -> None:
    num_in, num_out = base
    expected = {"A": [lora_rank, num_in], "B": [num_out, lora_rank]}.get(side, [num_out])
    if shape == expected:
        return
    if len(shape) == len(expected) == 2 and shape[1 if side == "A" else 0] == expected[1 if side == "A" else 0]:
        raise _refused(
            weights_path, f"has {name} of shape {shape}; {CONFIG_FILE} says r={lora_rank}: {expected}.", "rank_mismatch"
        )
    raise _refused(
        weights_path,
        f"has {name} of shape {shape}; the base model wants {expected}. Was it trained for another base model?",
        "wrong_shape",
    )
