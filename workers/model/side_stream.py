"""How an adapter gets onto a CUDA device while steps run on it: through pinned memory, on a stream of its own.

Owns: the stream, one staging buffer on either side. Leaves to others: which slot (engine/), what goes where
(slot_write.py), when steps see it (`ModelRunner.commit`).
"""

from __future__ import annotations

import threading

import torch

from lorafleet.workers.model.slot_write import SlotWrite


class SideStream:
    """Thread-safe; one adapter at a time, since all go over the same bus."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(device)
        self._pinned = torch.empty(0, dtype=torch.uint8)
        self._staged = torch.empty(0, dtype=torch.uint8, device=device)

    def fill(self, write: SlotWrite) -> None:
        """Do all of a write into a slot that no request uses, and wait for it on this thread. Steps go on meanwhile.

        The host tier's memory is not pinned, which would take as much from all other processes. So an adapter's bytes
        go to a pinned buffer, from there to the device in one piece, and there to their places.
        """
        with self._lock, torch.cuda.stream(self._stream):
            storage = write.storage
            if storage is not None:
                num_bytes = storage.nbytes()
                if num_bytes > self._pinned.numel():
                    self._pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
                    self._staged = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
                self._pinned[:num_bytes].copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
                self._staged[:num_bytes].copy_(self._pinned[:num_bytes], non_blocking=True)
            write.run_from(self._staged)
            self._stream.synchronize()
