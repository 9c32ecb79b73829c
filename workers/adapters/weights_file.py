"""A PEFT adapter's adapter_model.safetensors: its header checked against base model and config, its tensors read.

Which linears an adapter changes is read off the names here. What cannot be applied is refused with a reason.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from lorafleet.workers.adapters.config import CONFIG_FILE, AdapterConfig
from lorafleet.workers.adapters.digest import FileStamp
from lorafleet.workers.adapters.modules import FUSED, PARENTS, BaseShapes, module_name
from lorafleet.workers.errors import AdapterRefusedError

WEIGHTS_FILE = "adapter_model.safetensors"

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_TENSOR = re.compile(
    r"(?:base_model\.model\.)?model\.layers\.(?P<layer>[0-9]+)\.(?P<parent>self_attn|mlp)\.(?P<linear>\w+)\."
    r"(?:(?P<A>lora_A(?:\.[^.]+)?\.weight)|(?P<B>lora_B(?:\.[^.]+)?\.weight)|(?P<B_bias>lora_B(?:\.[^.]+)?\.bias)"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?)|(?P<bias>(?:base_layer\.)?bias))"
)
VECTORS = ("B_bias", "bias", "magnitude")  # one value an output
_SIDES = ("A", "B", *VECTORS)
SIDE_NAMES = {
    "A": "lora_A",
    "B": "lora_B",
    "B_bias": "the bias of lora_B",
    "bias": "the bias",
    "magnitude": "lora_magnitude_vector",
}


@dataclass(frozen=True, slots=True)
class Weights:
    """What one read of the weights file gave."""

    tensors: list[tuple[int, str, str, torch.Tensor]]  # (layer, linear, side, weights), in canonical order
    stamp: FileStamp | None  # None: it proves nothing
    changed: bool  # while it was read


def read_weights(
    path: Path, base: BaseShapes, config: AdapterConfig, max_lora_rank: int | None = None, *, settle: bool = False
) -> Weights:
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
    return Weights(_views(data, places), proof, changed)


class _Place(NamedTuple):
    """Where a tensor's bytes begin behind the header, and what they are. Sorts canonically."""

    layer: int
    linear: str
    side: str
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def _views(data: torch.Tensor, places: list[_Place]) -> list[tuple[int, str, str, torch.Tensor]]:
    elements = {dtype: data.view(dtype) for dtype in DTYPES.values()}
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
            shape, lora_rank = base.of(linear), config.rank(module_name(layer, linear))
            assert shape is not None
            if max_lora_rank is not None and lora_rank > max_lora_rank:
                raise _refused(
                    weights_path.with_name(CONFIG_FILE),
                    f"has rank {lora_rank}, the limit is {max_lora_rank} ({module_name(layer, linear)}). Start with "
                    f"--max-lora-rank {lora_rank}.",
                    "rank_too_large",
                )
            _check_shape(weights_path, name, side, shapes[name], shape, lora_rank)
        dtypes = {name: DTYPES.get(slices[name].get_dtype()) for name in keys}
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
        if match is None or PARENTS.get(match["linear"]) != match["parent"] or base.of(match["linear"]) is None:
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
        for part in FUSED.get(linear, ()):
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
                f"has {SIDE_NAMES[side]} of {where}, but {CONFIG_FILE} does not ask for it with {option}.",
                "config_mismatch",
            )
        # A bias of its own has a module only where the base model has one.
        if is_asked and side not in sides and side != "bias":
            raise _refused(
                weights_path,
                f"lacks {SIDE_NAMES[side]} of {where}, which {CONFIG_FILE} asks for with {option}.",
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


def _refused(where: Path, what: str, reason: str) -> AdapterRefusedError:
    return AdapterRefusedError(f"{where} {what}", reason=reason)
