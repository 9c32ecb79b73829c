"""Adapter weights in their device slots, and their addition to a linear.

Each fused linear has one `LoraLinear` with the weights of all slots. Slots are allocated once at `max_lora_rank`; each
adapter is computed at its own rank. Under tensor parallelism LoRA follows its layer: a column-parallel one replicates A
and shards B's rows, a row-parallel one shards A's columns and replicates B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorafleet.kernels.linear import LinearWeight, dense
from lorafleet.kernels.lora import LoraSegments, LoraSlots, lora_add_
from lorafleet.kernels.lora_tiles import LoraTiles
from lorafleet.workers.adapters.format import HostAdapter, LinearChange
from lorafleet.workers.model.slot_write import SlotRows

# L slots, N linears fused into one, R lora rank, T tokens, I in features, O out features of the fused linear


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint linear within a fused one: this rank's range of its rows."""

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
    """The capacity of the slots; the same for all linears of a model."""

    num_slots: int
    max_lora_rank: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class BaseLinear:
    """The linear that LoRA is added to, as this rank holds it."""

    weight: LinearWeight
    bias_O: torch.Tensor | None
    adds_bias: bool  # true on one rank
    is_whole: bool  # this rank has all input features


class LoraLinear:
    """All slots' A and B for one fused linear of one layer."""

    def __init__(self, layer: int, parts: tuple[Part, ...], columns: slice, shape: SlotShape) -> None:
        """`columns`: this rank's input features."""
        self._layer = layer
        self._parts = parts
        self._columns = columns
        slots, rank = shape.num_slots, shape.max_lora_rank
        num_in, num_out = columns.stop - columns.start, sum(part.size for part in parts)
        ends = torch.tensor([part.size for part in parts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self._ends = ends.tolist()

        def zeros(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(sizes, dtype=dtype, device=shape.device)

        # Ranks, scalings and the affine flags in one tensor, so that one copy writes them.
        numbers_3LN = zeros(3, slots, len(parts), dtype=torch.int32)
        self._numbers_L3N = numbers_3LN.transpose(0, 1)
        self._slots = LoraSlots(
            a_LNRI=zeros(slots, len(parts), rank, num_in, dtype=shape.dtype),
            b_LRO=zeros(slots, rank, num_out, dtype=shape.dtype),
            rank_LN=numbers_3LN[0],
            scaling_LN=numbers_3LN[1].view(torch.float32),
            is_affine_LN=numbers_3LN[2],
            scale_LO=zeros(slots, num_out, dtype=torch.float32),
            shift_LO=zeros(slots, num_out, dtype=torch.float32),
            slice_end_N=ends.to(shape.device),
            is_aligned=all(part.size % 16 == 0 for part in parts),
        )

    def rows(self, adapter: HostAdapter, base: BaseLinear, out: SlotRows) -> None:
        """Add an adapter's rows for a slot to `out`. Slow the first time for DoRA.

        If this rank lacks some inputs, a DoRA adapter's norms must already be in `HostAdapter.norms`.
        """
        slots = self._slots
        ranks, affine = [0] * len(self._parts), [0] * len(self._parts)
        scalings = [0.0] * len(self._parts)
        begin = 0
        for n, (part, end) in enumerate(zip(self._parts, self._ends, strict=True)):
            change = adapter.weights.get((self._layer, part.name))
            if change is not None:
                rank = ranks[n] = change.a_RI.shape[0]
                scalings[n] = change.scaling
                if rank:
                    out.add(slots.a_LNRI[:, n, :rank], _cut(change.a_RI, self._columns))
                    out.add(slots.b_LRO[:, :rank, begin:end], _cut(change.b_RO, part.rows))
                if any(vector is not None for vector in (change.b_bias_O, change.bias_O, change.magnitude_O)):
                    affine[n] = 1
                    norm_O = adapter.norms.get((self._layer, part.name))
                    if norm_O is None and change.magnitude_O is not None:
                        assert base.is_whole, "the ranks' squares must be summed first"
                        squares_O = self._squares(change, part, base, slice(begin, end))
                        norm_O = adapter.norms[self._layer, part.name] = squares_O.sqrt_()
                    scale_O, shift_O = _affine(change, norm_O, part, base, slice(begin, end))
                    out.add(slots.scale_LO[:, begin:end], scale_O, is_own=True)
                    out.add(slots.shift_LO[:, begin:end], shift_O, is_own=True)
            begin = end
        out.add_numbers(self._numbers_L3N, ranks, scalings, affine)

    def partial_squares(self, adapter: HostAdapter, base: BaseLinear) -> torch.Tensor:
        """Return the squares of a lone linear with DoRA, [O]; its norms are the roots of their sum over the ranks."""
        (part,) = self._parts
        return self._squares(adapter.weights[self._layer, part.name], part, base, slice(0, part.size))

    def _squares(self, change: LinearChange, part: Part, base: BaseLinear, rows: slice) -> torch.Tensor:
        """Sum (W + s·B·A)² over this rank's inputs, [O] in float32. `rows`: the part's rows in the base."""
        changed_OI = dense(base.weight, rows).cpu()
        b_OR = _cut(change.b_RO, part.rows).T.float()
        changed_OI.addmm_(b_OR, _cut(change.a_RI, self._columns).float(), alpha=change.scaling)
        return changed_OI.square_().sum(dim=1)

    def add_(self, y_TO: torch.Tensor, x_TI: torch.Tensor, segments: LoraSegments | LoraTiles) -> None:
        """Add the adapters' terms to y for the rows in `segments`."""
        lora_add_(y_TO, x_TI, self._slots, segments)


def _cut(weights: torch.Tensor, columns: slice) -> torch.Tensor:
    # A single rank needs all columns, and slicing would take as long as the copy.
    return weights if columns.stop - columns.start == weights.shape[1] else weights[:, columns]


def _affine(
    change: LinearChange, norm_O: torch.Tensor | None, part: Part, base: BaseLinear, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scale, shift) of a part's outputs.

    The base gives W·x + b, an adapter m·(W·x + s·(B·A·x + c)) + b', with m = magnitude ÷ norm for DoRA, else 1; c the
    bias of B; b' the adapter's bias if it has one, else b.
    """
    scale_O, bias_O, shift_O = torch.ones(part.size), torch.zeros(part.size), torch.zeros(part.size)
    if change.magnitude_O is not None and norm_O is not None:
        scale_O = change.magnitude_O[part.rows] / norm_O
    if base.adds_bias:
        if base.bias_O is not None:
            bias_O = base.bias_O[rows].float().cpu()
        shift_O = (bias_O if change.bias_O is None else change.bias_O[part.rows]) - scale_O * bias_O
        if change.b_bias_O is not None:
            shift_O += change.scaling * scale_O * change.b_bias_O[part.rows]
    return scale_O, shift_O
