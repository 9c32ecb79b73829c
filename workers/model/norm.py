"""An RMSNorm's weight, and the adapters' weights that replace it. Replicated on all ranks.

H features, W weights: the base model's, then one per slot.
"""

from __future__ import annotations

import torch

from lorafleet.workers.adapters.format import HostAdapter
from lorafleet.workers.adapters.modules import module_name
from lorafleet.workers.model.loader import CheckpointReader
from lorafleet.workers.model.slot_write import SlotRows


class Norm:
    """`weight_WH` is read by the kernels; a row with an adapter in slot s uses weight 1 + s, any other row weight 0."""

    def __init__(self, layer: int, name: str, weight_H: torch.Tensor) -> None:
        """`weight_H`: uninitialised memory."""
        self._key = (layer, name)
        self.weight_WH = weight_H[None]

    def load(self, reader: CheckpointReader) -> None:
        reader.read_into(self.weight_WH[0], f"{module_name(*self._key)}.weight")

    def add_slots(self, num_slots: int) -> None:
        """Allocate a weight per slot. Call before `load`."""
        self.weight_WH = self.weight_WH.new_empty(1 + num_slots, self.weight_WH.shape[1])

    def slot_rows(self, adapter: HostAdapter, out: SlotRows) -> None:
        """Add the row of an adapter with its own norms: its weight here, or else the base model's."""
        out.add(self.weight_WH[1:], adapter.norm_weights.get(self._key, self.weight_WH[0]))
