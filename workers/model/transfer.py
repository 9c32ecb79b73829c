"""Copies of small tensors to the device and back, without making either side wait. On a CPU nothing is copied.

A copy from unpinned memory makes torch wait for all earlier work of the device. Pinned memory comes from torch's cache,
which reuses none before the copies from it are done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def send(tensor: torch.Tensor, device: torch.device, into: torch.Tensor | None = None) -> torch.Tensor:
    """Return a host tensor on the device, in `into` if given. On a CPU without `into` it is the tensor itself."""
    if device.type != "cuda":
        return tensor if into is None else into.copy_(tensor)
    pinned = tensor.pin_memory()
    return pinned.to(device, non_blocking=True) if into is None else into.copy_(pinned, non_blocking=True)


class Fetched:
    """Device tensors on their way to the host, as of the completion of all work launched before."""

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
        """Wait for the tensors; return them on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors
