"""An adapter on its way into a slot: prepared on another thread, copied in pieces between steps.

Preparing does what takes long or Python (where each row goes, DoRA's norms, memory beside the slot). What is left for
the thread that makes the steps is moving bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import torch

from lorafleet.kernels.copy import Copies
from lorafleet.workers.adapters.format import HostAdapter


class SlotRows:
    """Collects what is copied to a slot. Numbers of a linear are gathered into one tensor for the whole adapter."""

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._places_of_numbers: list[torch.Tensor] = []
        self._numbers = bytearray()

    def add(self, place_L: torch.Tensor, source: torch.Tensor) -> None:
        """Behind the slots' dimension `place_L` has the shape of `source`."""
        self._pairs.append((place_L, source if source.dtype == place_L.dtype else source.to(place_L.dtype)))

    def add_numbers(
        self, place_L3N: torch.Tensor, ranks: Sequence[int], scalings: Sequence[float], affine: Sequence[int]
    ) -> None:
        """`place_L3N` is of 32-bit integers; scalings go there as they lie in memory."""
        count = len(ranks)
        self._places_of_numbers.append(place_L3N)
        self._numbers += struct.pack(f"={count}i{count}f{count}i", *ranks, *scalings, *affine)

    def copies(self) -> Copies:
        flat = torch.frombuffer(self._numbers, dtype=torch.int32)
        parts = flat.split([place.shape[1] * place.shape[2] for place in self._places_of_numbers])
        numbers = zip(self._places_of_numbers, parts, strict=True)
        return Copies([*self._pairs, *((place, part.view(place.shape[1:])) for place, part in numbers)])


class SlotWrite:
    """One adapter into one slot that no request uses. `advance` until that is true, then `commit`."""

    def __init__(self, slot: int, adapter: HostAdapter, copies: Copies, commit: Callable[[], None]) -> None:
        """commit: lets the steps see what the adapter has beside what is copied."""
        self.commit = commit
        self._slot = slot
        self._adapter = adapter  # its memory is read
        self._copies = copies
        self._num_done = 0

    def advance(self, max_bytes: int) -> bool:
        """Copy a piece; whether that was the last."""
        copies = self._copies
        if self._num_done < copies.num_copies:
            end = copies.end_of(self._num_done, max_bytes)
            copies.run(self._slot, self._num_done, end)
            self._num_done = end
        return self._num_done == copies.num_copies
