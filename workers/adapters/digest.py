"""Identity of an adapter: a digest of its content, of everything that changes the mathematics and nothing else.

Names, paths, key style, dropout and the like do not count. So the same weights under two names are one adapter, and a
changed file under an old name is another.

Also owns `FileStamp`: proof that a file did not change, which saves hashing it again.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from dataclasses import dataclass
from typing import IO

import torch

_TICK_NS = 20_000_000  # longer than any tick of the file system's clock (1 to 10 ms)


class AdapterHash:
    """SHA-256 over each tensor's place, scaling, dtype, shape and bytes in canonical order, then over notes."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256(b"lorafleet adapter 2\0")

    def add(self, layer: int, linear: str, side: str, scaling: float, tensor: torch.Tensor) -> None:
        head = f"{layer}\0{linear}\0{side}\0{tensor.dtype}\0{tuple(tensor.shape)}\0"
        self._hash.update(head.encode() + struct.pack("<d", scaling))
        self._hash.update(tensor.contiguous().view(torch.uint8).numpy().data)

    def note(self, text: str) -> None:
        """Add something other than a tensor that changes the mathematics. All tensors must be added before."""
        self._hash.update(f"\0{len(text)}\0{text}".encode())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


@dataclass(frozen=True, slots=True)
class FileStamp:
    """The file system's record of a file's content: the same stamp means the same bytes.

    The change time makes this proof: every write sets it, and unlike the modification time it cannot be set back. But
    two changes within one clock tick look the same, so call `settle` before reading content that a stamp must prove.
    """

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, file: IO[bytes]) -> FileStamp:
        stat = os.fstat(file.fileno())
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    def settle(self) -> bool:
        """Wait, at most 20 ms, until the clock has ticked since the last change.

        Return False if the stamp proves nothing even then: it has whole seconds, or its clock is ahead of ours.
        """
        age_ns = time.time_ns() - self.changed_ns
        if age_ns < 0 or self.changed_ns % 1_000_000_000 == 0:
            return False
        time.sleep(max(0, _TICK_NS - age_ns) / 1e9)
        return True
