"""LoRA of many adapters in one batch (Hu et al. 2021; segments as in Punica, Chen et al. 2023).

For each segment g, its rows x and each slice n of the fused linear, with slot s = slot[g] and r = rank[s, n]:

    y[:, slice n] += weight[g] · scaling[s, n] · (x · A[s, n, :r]ᵀ) · B[s, :r, slice n]

and then, if is_affine[s, n] (weight[g] is then 1 and these rows are in no other segment):

    y[:, slice n] = scale[s, slice n] · y[:, slice n] + shift[s, slice n]

which is DoRA's renormalisation (Liu et al. 2024), an adapter's own bias, or both.

A row may be in several segments (a composition of adapters) or in none (the base model; its y stays unchanged, bit by
bit). Only an adapter's own rank is computed. A slot's weights affect only rows of its segments, whatever they contain.

T rows, I in features, O out features of the fused linear, L slots, N slices, R largest rank, G segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorafleet.kernels.dispatch import uses_triton
from lorafleet.kernels.lora_tiles import LoraTiles, block_rows_for, divide
from lorafleet.kernels.native import DTYPE_CODES, library


@dataclass(frozen=True, slots=True)
class LoraSegments:
    """The rows that use each slot. On the batch's device."""

    start_G: torch.Tensor  # int32, first row
    end_G: torch.Tensor  # int32, end row (exclusive)
    slot_G: torch.Tensor  # int32
    weight_G: torch.Tensor  # float32, 1 unless adapters are composed


@dataclass(frozen=True, slots=True)
class LoraSlots:
    """Adapters' weights for one fused linear. All contiguous; the adapters' dtype may differ from the activations'."""

    a_LNRI: torch.Tensor
    b_LRO: torch.Tensor
    rank_LN: torch.Tensor  # int32; 0 for a slice that the adapter does not change
    scaling_LN: torch.Tensor  # float32
    is_affine_LN: torch.Tensor  # int32
    scale_LO: torch.Tensor  # float32
    shift_LO: torch.Tensor  # float32
    slice_end_N: torch.Tensor  # int32
    is_aligned: bool = False  # every slice begins at a multiple of 16 features, so a GPU reads 16 bytes at once


def lora_add_(y_TO: torch.Tensor, x_TI: torch.Tensor, slots: LoraSlots, segments: LoraSegments | LoraTiles) -> None:
    """Add the adapters' terms to y in place; sums are float32.

    A GPU reads tiles. Given segments, each call divides them into tiles, which waits for the device.
    """
    native = library()
    is_on_gpu = uses_triton(y_TO.device)
    if native is None and not is_on_gpu:
        assert isinstance(segments, LoraSegments)
        lora_add_reference_(y_TO, x_TI, slots, segments)
        return
    a_LNRI, b_LRO = slots.a_LNRI, slots.b_LRO
    _, num_slices, max_rank, num_in = a_LNRI.shape
    assert y_TO.stride(1) == x_TI.stride(1) == 1 and y_TO.dtype == x_TI.dtype and a_LNRI.dtype == b_LRO.dtype
    assert a_LNRI.is_contiguous() and b_LRO.is_contiguous() and x_TI.shape[1] == num_in
    assert y_TO.shape[1] == b_LRO.shape[2] and b_LRO.shape[1] == max_rank
    assert slots.rank_LN.dtype == slots.is_affine_LN.dtype == torch.int32
    assert slots.scale_LO.dtype == slots.shift_LO.dtype == slots.scaling_LN.dtype == torch.float32
    if is_on_gpu:
        from lorafleet.kernels.gpu.lora import lora_add_ as on_gpu

        on_gpu(
            y_TO,
            x_TI,
            a_LNRI,
            b_LRO,
            slots.rank_LN,
            slots.scaling_LN,
            slots.is_affine_LN,
            slots.scale_LO,
            slots.shift_LO,
            slots.slice_end_N,
            slots.is_aligned,
            segments if isinstance(segments, LoraTiles) else _divide(segments, y_TO.shape[0]),
        )
        return
    assert isinstance(segments, LoraSegments)
    assert segments.start_G.dtype == segments.end_G.dtype == segments.slot_G.dtype == torch.int32
    native.lf_lora_add(
        DTYPE_CODES[y_TO.dtype],
        DTYPE_CODES[a_LNRI.dtype],
        y_TO.data_ptr(),
        y_TO.stride(0),
        x_TI.data_ptr(),
        x_TI.stride(0),
        a_LNRI.data_ptr(),
        b_LRO.data_ptr(),
        slots.rank_LN.data_ptr(),
        slots.scaling_LN.data_ptr(),
        slots.is_affine_LN.data_ptr(),
        slots.scale_LO.data_ptr(),
        slots.shift_LO.data_ptr(),
        slots.slice_end_N.data_ptr(),
        segments.start_G.data_ptr(),
        segments.end_G.data_ptr(),
        segments.slot_G.data_ptr(),
        segments.weight_G.data_ptr(),
        segments.slot_G.shape[0],
        num_slices,
        max_rank,
        num_in,
        y_TO.shape[1],
    )


def _divide(segments: LoraSegments, num_tokens: int) -> LoraTiles:
    columns = segments.start_G, segments.end_G, segments.slot_G, segments.weight_G
    starts, ends, slots, weights = (column.tolist() for column in columns)
    tiles = divide(starts, ends, slots, weights, block_rows_for(num_tokens))
    return tiles.on(tiles.packed().to(segments.start_G.device))


def lora_add_reference_(y_TO: torch.Tensor, x_TI: torch.Tensor, slots: LoraSlots, segments: LoraSegments) -> None:
    """Add segment by segment. Defines the correct result."""
    ends = slots.slice_end_N.tolist()
    columns = segments.start_G.tolist(), segments.end_G.tolist(), segments.slot_G.tolist(), segments.weight_G.tolist()
    for start, end, slot, weight in zip(*columns, strict=True):
        if start >= end:
            continue
        for n, (begin, stop) in enumerate(zip([0, *ends], ends, strict=False)):
            rank, is_affine = int(slots.rank_LN[slot, n]), bool(slots.is_affine_LN[slot, n])
            if not rank and not is_affine:
                continue
            own = y_TO[start:end, begin:stop].float()
            if rank:
                h = x_TI[start:end].float() @ slots.a_LNRI[slot, n, :rank].float().T
                own += (weight * slots.scaling_LN[slot, n] * h) @ slots.b_LRO[slot, :rank, begin:stop].float()
            if is_affine:
                own = own * slots.scale_LO[slot, begin:stop] + slots.shift_LO[slot, begin:stop]
            y_TO[start:end, begin:stop] = own.to(y_TO.dtype)
