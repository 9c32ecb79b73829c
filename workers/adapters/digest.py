"""An adapter's identity is its content: what changes the mathematics, and nothing else.

Names, paths, key style, dropout and the like do not count, so that the same weights under two names are one adapter and
a changed file under an old name is another.
"""

from __future__ import annotations

import hashlib
import struct

import torch


class AdapterHash:
    """SHA-256 over rank, scaling, and each tensor's place, dtype, shape and bytes, added in canonical order."""

    def __init__(self, *, lora_rank: int, scaling: float) -> None:
        self._hash = hashlib.sha256(b"lorafleet adapter 1\0" + struct.pack("<qd", lora_rank, scaling))

    def add(self, layer: int, linear: str, side: str, tensor: torch.Tensor) -> None:
        head = f"{layer}\0{linear}\0{side}\0{tensor.dtype}\0{tuple(tensor.shape)}\0"
        self._hash.update(head.encode())
        self._hash.update(tensor.contiguous().view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
