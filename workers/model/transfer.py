"""Small tensors to the device and back, without either side waiting for the other. On a CPU nothing moves.

A copy from memory that is not pinned makes torch wait for all that the device has to do before. Pinned memory comes
from torch's cache of it, which hands none out again before the copies from it are done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def send(tensor: torch.Tensor, device: torch.device, into: torch.Tensor | None = None) -> torch.Tensor:
    """A host tensor on the device, in `into` if that is given. On a CPU without `into` it is that tensor."""
    if device.type != "cuda":
        return tensor if into is None else into.copy_(tensor)
    pinned = tensor.pin_memory()
    return pinned.to(device, non_blocking=True) if into is None else into.copy_(pinned, non_blocking=True)


class Fetched:
    """Device tensors on their way to the host, as they will be when all is done that was launched before."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._arrived: torch.cuda.Event | None = None
        if not tensors[0].is_cuda:
            self._tensors = list(tensors)
            return
        self._tensors = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in tensors
        ]
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def tensors(self) -> list[torch.Tensor]:
        """On the host. Waits for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors
