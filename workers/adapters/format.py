"""A PEFT LoRA directory, verified, and turned into what a slot can hold.

Strict: what an adapter asks for is applied in full or refused with a reason. Leaves to others: the config's fields
(config.py), the weights file (weights_file.py), finding the directory (sources.py), keeping loaded adapters (store.py),
slots (model/lora.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from lorafleet.workers.adapters.config import AdapterConfig, read_config
from lorafleet.workers.adapters.digest import AdapterHash, FileStamp
from lorafleet.workers.adapters.modules import FUSED, BaseShapes, module_name
from lorafleet.workers.adapters.weights_file import DTYPES, SIDE_NAMES, VECTORS, WEIGHTS_FILE, Weights, read_weights
from lorafleet.workers.errors import AdapterRefusedError, AdapterUnavailableError


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
    weights = read_weights(path, base, config, max_lora_rank, settle=True)
    if weights.changed:
        raise _refused(path, "changed while it was read. Register it when it is complete.", "changed_while_read")
    for layer, linear, side, tensor in weights.tensors:
        if not _is_finite(tensor):
            raise _refused(
                path,
                f"has NaN or infinite values in {SIDE_NAMES[side]} of layer {layer} {linear}. Train or save it again.",
                "non_finite",
            )
    return AdapterSpec(
        digest=_digest(weights, config),
        path=path,
        config=config,
        lora_rank=max(tensor.shape[0] for _, _, side, tensor in weights.tensors if side == "A"),
        num_elements=sum(tensor.numel() for _, _, side, tensor in weights.tensors if side not in VECTORS),
        num_vector_elements=sum(tensor.numel() for _, _, side, tensor in weights.tensors if side in VECTORS),
        stamp=weights.stamp,
    )


def load_adapter(spec: AdapterSpec, base: BaseShapes, dtype: torch.dtype) -> HostAdapter:
    """Read a verified adapter's weights into memory of their own, in `dtype`.

    Hashes them only where the file's stamp does not prove that they are what was verified. Raises
    `AdapterUnavailableError` when the files are gone or are not what was verified, `AdapterRefusedError` when values
    overflow in `dtype`.
    """
    try:
        weights = read_weights(spec.path, base, spec.config)
    except AdapterRefusedError as error:
        raise AdapterUnavailableError(f"{error.message} It was fine when it was registered.", param="model") from error
    proven = weights.stamp is not None and weights.stamp == spec.stamp and not weights.changed
    if not proven and _digest(weights, spec.config) != spec.digest:
        raise AdapterUnavailableError(
            f"{spec.path} changed since it was registered; register it again to serve the new version.", param="model"
        )
    # What was verified is finite, so only a smaller range can make it otherwise.
    wider = {other for other in DTYPES.values() if torch.finfo(other).max > torch.finfo(dtype).max}
    kept: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for (layer, linear, side, stored), tensor in zip(weights.tensors, _in_dtype(weights, dtype), strict=True):
        if stored.dtype in wider and not _is_finite(tensor):
            raise _refused(
                spec.path,
                f"overflows in {dtype} in {SIDE_NAMES[side]} of layer {layer} {linear}. Use --lora-dtype bfloat16.",
                "non_finite",
            )
        kept.setdefault((layer, linear), {})[side] = _turned_in_place(tensor) if side == "B" else tensor
    changes: dict[tuple[int, str], LinearChange] = {}
    for (layer, linear), sides in kept.items():
        changes |= _split(layer, linear, sides, spec.config.scaling(module_name(layer, linear)), base, dtype)
    return HostAdapter(digest=spec.digest, weights=changes, num_bytes=spec.num_bytes(dtype))


def _split(
    layer: int, linear: str, sides: Mapping[str, torch.Tensor], scaling: float, base: BaseShapes, dtype: torch.dtype
) -> dict[tuple[int, str], LinearChange]:
    """By the linears that a module is made of; most are made of themselves."""
    shape = base.of(linear)
    assert shape is not None
    a_RI, b_RO = (
        sides[side] if side in sides else torch.empty(0, size, dtype=dtype)
        for side, size in zip("AB", shape, strict=True)
    )
    changes, begin = {}, 0
    for part in FUSED.get(linear, (linear,)):
        end = begin + base.linears[part][1]
        own = {name: sides[name][begin:end] for name in VECTORS if name in sides}
        changes[layer, part] = LinearChange(
            a_RI, b_RO[:, begin:end], scaling, own.get("B_bias"), own.get("bias"), own.get("magnitude")
        )
        begin = end
    return changes


def _digest(weights: Weights, config: AdapterConfig) -> str:
    adapter_hash = AdapterHash()
    for layer, linear, side, tensor in weights.tensors:
        adapter_hash.add(layer, linear, side, config.scaling(module_name(layer, linear)), tensor)
    return adapter_hash.hexdigest()


def _is_finite(tensor: torch.Tensor) -> bool:
    # A sum is finite only if all its terms are, and takes a twentieth of looking at each; it may overflow, though.
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(torch.isfinite(tensor).all())


def _in_dtype(weights: Weights, dtype: torch.dtype) -> list[torch.Tensor]:
    """The matrices themselves if all are in `dtype`, else converted into one new buffer. Vectors become float32."""
    matrices = [tensor for _, _, side, tensor in weights.tensors if side not in VECTORS]
    if any(tensor.dtype != dtype for tensor in matrices):
        sizes = [tensor.numel() for tensor in matrices]
        parts = torch.empty(sum(sizes), dtype=dtype).split(sizes)
        matrices = [part.view(tensor.shape).copy_(tensor) for part, tensor in zip(parts, matrices, strict=True)]
    rest = iter(matrices)
    # Copies: a view would keep the whole file in memory beside the new buffer.
    return [
        tensor.to(torch.float32, copy=True) if side in VECTORS else next(rest) for _, _, side, tensor in weights.tensors
    ]


def _turned_in_place(b_OR: torch.Tensor) -> torch.Tensor:
    """B as [R, O], in the same memory."""
    # As integers, by numpy: it knows no bfloat16, and turns so small matrices several times faster than torch.
    words_OR = b_OR.view(torch.int32 if b_OR.itemsize == 4 else torch.int16).numpy()
    words_OR.reshape(-1)[:] = words_OR.T.ravel()
    return b_OR.view(b_OR.shape[1], b_OR.shape[0])


def _refused(path: Path, what: str, reason: str) -> AdapterRefusedError:
    return AdapterRefusedError(f"{path / WEIGHTS_FILE} {what}", reason=reason)
