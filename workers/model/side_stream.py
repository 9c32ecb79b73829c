"""Copying of adapters to a CUDA device during steps: through pinned memory, on a stream of its own.

Owns: the stream, the buffers on both sides. Leaves to others: the choice of slot (engine/), the copies (slot_write.py),
the time steps see the adapter (`ModelRunner.commit`).
"""

from __future__ import annotations

import threading

import torch

from lorafleet.workers.model.slot_write import SlotWrite

# A step's input uses the same bus and waits for at most one piece: a tenth of a millisecond.
_PIECE_BYTES = 2 << 20
_NUM_PIECES = 2  # one is filled while the other is sent


class SideStream:
    """Thread-safe; handles one adapter at a time, since all use the same bus."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(device)
        self._pinned = torch.empty(_NUM_PIECES, _PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        self._sent = [torch.cuda.Event() for _ in range(_NUM_PIECES)]
        self._staged = torch.empty(0, dtype=torch.uint8, device=device)

    def fill(self, write: SlotWrite) -> None:
        """Complete a write into a slot that no request uses; block this thread until done. Steps continue meanwhile.

        The host tier's memory is not pinned, since that would withhold it from all other processes. So an adapter's
        bytes go through a pinned buffer to the device, piece by piece, and there to their places.
        """
        with self._lock, torch.cuda.stream(self._stream):
            if write.storage is not None:
                self._stage(torch.empty(0, dtype=torch.uint8).set_(write.storage))
            # A step launched before the slot was taken from its last adapter may still read it.
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            write.run_from(self._staged)
            self._stream.synchronize()

    def _stage(self, source: torch.Tensor) -> None:
        num_bytes = source.numel()
        if num_bytes > self._staged.numel():
            self._staged = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        for number, begin in enumerate(range(0, num_bytes, _PIECE_BYTES)):
            piece, sent = self._pinned[number % _NUM_PIECES], self._sent[number % _NUM_PIECES]
            sent.synchronize()  # returns at once the first time
            size = min(_PIECE_BYTES, num_bytes - begin)
            piece[:size].copy_(source[begin : begin + size])
            self._staged[begin : begin + size].copy_(piece[:size], non_blocking=True)
            sent.record(self._stream)
