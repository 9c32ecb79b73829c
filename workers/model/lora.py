"""Adapter weights in their device slots, and how a linear adds them.

Each fused linear has one `LoraLinear` with the weights of all slots. Slots are allocated at `max_lora_rank` once; what
is computed is each adapter's own rank. Under tensor parallelism LoRA follows its layer: a column-parallel one
replicates A and takes its rows of B, a row-parallel one takes its columns of A and replicates B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorafleet.kernels.lora import LoraSegments, lora_add_
from lorafleet.workers.adapters.format import HostAdapter

# L slots, N linears fused into one, R lora rank, T tokens, I in features, O out features of the fused linear


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint linear within a fused one: the rows of the whole that this rank holds."""

    name: str  # "q_proj"
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class SlotShape:
    """How much room the slots have; the same for all linears of a model."""

    num_slots: int
    max_lora_rank: int
    dtype: torch.dtype
    device: torch.device


class LoraLinear:
    """All slots' A and B for one fused linear of one layer."""

    def __init__(self, layer: int, parts: tuple[Part, ...], columns: slice, shape: SlotShape) -> None:
        """`columns`: the input features that this rank holds."""
        self._layer = layer
        self._parts = parts
        self._columns = columns
        slots, rank = shape.num_slots, shape.max_lora_rank
        num_in, num_out = columns.stop - columns.start, sum(part.size for part in parts)
        self.a_LNRI = torch.zeros(slots, len(parts), rank, num_in, dtype=shape.dtype, device=shape.device)
        self.b_LRO = torch.zeros(slots, rank, num_out, dtype=shape.dtype, device=shape.device)
        self.rank_LN = torch.zeros(slots, len(parts), dtype=torch.int32, device=shape.device)
        self.scaling_LN = torch.zeros(slots, len(parts), dtype=torch.float32, device=shape.device)
        ends = torch.tensor([part.size for part in parts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.slice_end_N = ends.to(shape.device)
        self._ends = ends.tolist()

    def write(self, slot: int, adapter: HostAdapter) -> None:
        """Put an adapter's part into a slot that no running request uses."""
        ranks, scalings = [0] * len(self._parts), [0.0] * len(self._parts)
        begin = 0
        for n, (part, end) in enumerate(zip(self._parts, self._ends, strict=True)):
            pair = adapter.weights.get((self._layer, part.name))
            if pair is not None:
                rank = ranks[n] = pair.a_RI.shape[0]
                scalings[n] = pair.scaling
                self.a_LNRI[slot, n, :rank] = _cut(pair.a_RI, self._columns)
                self.b_LRO[slot, :rank, begin:end] = _cut(pair.b_RO, part.rows)
            begin = end
        self.rank_LN[slot] = torch.tensor(ranks, dtype=torch.int32)
        self.scaling_LN[slot] = torch.tensor(scalings, dtype=torch.float32)

    def add_(self, y_TO: torch.Tensor, x_TI: torch.Tensor, segments: LoraSegments) -> None:
        """y += the adapters' terms for the rows in `segments`."""
        lora_add_(y_TO, x_TI, self.a_LNRI, self.b_LRO, self.rank_LN, self.scaling_LN, self.slice_end_N, segments)


def _cut(weights: torch.Tensor, columns: slice) -> torch.Tensor:
    # One rank alone wants them all, and a slice would take it as long as the copy.
    return weights if columns.stop - columns.start == weights.shape[1] else weights[:, columns]
