"""An RMSNorm's weight, with the adapters' own in place of it. Replicated on all ranks.

H features, W weights: the base model's, and behind it one a slot.
"""

from __future__ import annotations

import torch

from lorafleet.workers.adapters.format import HostAdapter
from lorafleet.workers.adapters.modules import module_name
from lorafleet.workers.model.loader import CheckpointReader
from lorafleet.workers.model.slot_write import SlotRows


class Norm:
    """`weight_WH` is what the kernels read; a row of an adapter in slot s has weight 1 + s, any other row weight 0."""

    def __init__(self, layer: int, name: str, weight_H: torch.Tensor) -> None:
        """`weight_H`: empty memory."""
        self._key = (layer, name)
        self.weight_WH = weight_H[None]

    def load(self, reader: CheckpointReader) -> None:
        reader.read_into(self.weight_WH[0], f"{module_name(*self._key)}.weight")

    def add_slots(self, num_slots: int) -> None:
        """Before `load`."""
        self.weight_WH = self.weight_WH.new_empty(1 + num_slots, self.weight_WH.shape[1])

    def slot_rows(self, adapter: HostAdapter, out: SlotRows) -> None:
        """Of an adapter with norms of its own: this one, or the base model's where it has none here."""
        out.add(self.weight_WH[1:], adapter.norm_weights.get(self._key, self.weight_WH[0]))
