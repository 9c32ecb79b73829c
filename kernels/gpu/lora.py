"""LoRA of many adapters in Triton: shrink, h = x·Aᵀ, then expand, y += h·B. See kernels/lora.py and lora_tiles.py.

Both run over pieces at each adapter's own rank: blocks beyond that rank are neither read nor multiplied. One launch
does all slices of a fused linear. A step of few rows is limited by reading A and B, so shrink splits the inputs over
programs until the device is full (split-K). Each program writes its own part of h, and expand sums the parts, so that
results do not depend on the order in which programs end.

h is float32. Shrink multiplies in the adapters' dtype if the activations have it too, else in float32; expand in TF32,
which keeps more of h than 16 bits would, or in float32 if that is the dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorafleet.kernels.gpu.device import num_multiprocessors
from lorafleet.kernels.lora_tiles import SMALL_ROWS, LoraTiles

_BLOCK_RANK = 16
_MAX_SPLITS = 16
_PROGRAMS_EACH = 2  # per multiprocessor


def lora_add_(
    y_TO: torch.Tensor,
    x_TI: torch.Tensor,
    a_LNRI: torch.Tensor,
    b_LRO: torch.Tensor,
    rank_LN: torch.Tensor,
    scaling_LN: torch.Tensor,
    is_affine_LN: torch.Tensor,
    scale_LO: torch.Tensor,
    shift_LO: torch.Tensor,
    slice_end_N: torch.Tensor,
    is_aligned: bool,
    tiles: LoraTiles,
) -> None:
    _, num_slices, max_rank, num_in = a_LNRI.shape
    num_out = y_TO.shape[1]
    num_tiles, num_pieces = tiles.start_B.shape[0], tiles.slot_P.shape[0]
    if not num_tiles:
        return
    is_small = tiles.block_rows == SMALL_ROWS
    block_in = 128 if is_small else 64
    num_rank_blocks = triton.cdiv(max_rank, _BLOCK_RANK)
    wanted = triton.cdiv(_PROGRAMS_EACH * num_multiprocessors(y_TO.device), num_pieces * num_slices)
    num_splits = max(1, min(wanted, _MAX_SPLITS, num_in // (2 * block_in)))
    h = torch.empty(
        num_splits, num_pieces, num_slices, tiles.block_rows, max_rank, dtype=torch.float32, device=y_TO.device
    )
    assert h.numel() < 1 << 31, "offsets into h have 32 bits"
    # Triton's interpreter multiplies the bits of bfloat16.
    in_float32 = x_TI.dtype != a_LNRI.dtype or x_TI.dtype == torch.float32 or not x_TI.is_cuda
    _shrink[(num_pieces, num_slices * num_rank_blocks, num_splits)](
        x_TI,
        x_TI.stride(0),
        a_LNRI,
        rank_LN,
        tiles.start_B,
        tiles.end_B,
        tiles.tile_P,
        tiles.slot_P,
        h,
        num_in,
        max_rank,
        NUM_SLICES=num_slices,
        BLOCK_ROWS=tiles.block_rows,
        BLOCK_RANK=_BLOCK_RANK,
        BLOCK_IN=block_in,
        IS_EVEN=num_in % block_in == 0,
        IN_FLOAT32=in_float32,
        num_warps=4,
        num_stages=4,
        enable_fp_fusion=True,
    )
    precision = "ieee" if torch.float32 in (y_TO.dtype, b_LRO.dtype) else "tf32"
    block_out = 64 if num_tiles < 8 or precision == "ieee" else 128
    _expand[(num_tiles, triton.cdiv(num_out, block_out) + num_slices - 1)](
        y_TO,
        y_TO.stride(0),
        h,
        b_LRO,
        rank_LN,
        scaling_LN,
        is_affine_LN,
        scale_LO,
        shift_LO,
        slice_end_N,
        tiles.start_B,
        tiles.end_B,
        tiles.first_B1,
        tiles.slot_P,
        tiles.weight_P,
        num_pieces,
        num_splits,
        num_out,
        max_rank,
        NUM_SLICES=num_slices,
        BLOCK_ROWS=tiles.block_rows,
        BLOCK_RANK=_BLOCK_RANK,
        BLOCK_OUT=block_out,
        IS_ALIGNED=is_aligned,
        PRECISION=precision,
        num_warps=4 if is_small else 8,
        num_stages=2,
        enable_fp_fusion=True,
    )


@triton.jit
def _shrink(
    x,
    x_stride,
    a,
    rank,
    tile_start,
    tile_end,
    tile_of,
    slot_of,
    h,
    num_in,
    max_rank,
    NUM_SLICES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    IS_EVEN: tl.constexpr,  # num_in is a multiple of BLOCK_IN
    IN_FLOAT32: tl.constexpr,
):
    piece = tl.program_id(0)
    n = tl.program_id(1) % NUM_SLICES
    first_rank = tl.program_id(1) // NUM_SLICES * BLOCK_RANK
    split, num_splits = tl.program_id(2), tl.num_programs(2)
    tile = tl.load(tile_of + piece)
    start, end = tl.load(tile_start + tile), tl.load(tile_end + tile)
    place = tl.load(slot_of + piece) * NUM_SLICES + n
    own_rank = tl.load(rank + place)
    if (start >= end) | (first_rank >= own_rank):
        return
    rows = start + tl.arange(0, BLOCK_ROWS)
    ranks = first_rank + tl.arange(0, BLOCK_RANK)
    columns = split * BLOCK_IN + tl.arange(0, BLOCK_IN)
    is_row, is_rank = (rows < end)[:, None], (ranks < own_rank)[None, :]
    x += rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
    a += place.to(tl.int64) * max_rank * num_in + ranks[None, :] * num_in + columns[:, None]
    sums = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
    for first in range(split * BLOCK_IN, num_in, num_splits * BLOCK_IN):
        if IS_EVEN:
            x_part = tl.load(x, mask=is_row, other=0.0)
            a_part = tl.load(a, mask=is_rank, other=0.0)
        else:
            is_in = tl.arange(0, BLOCK_IN) < num_in - first
            x_part = tl.load(x, mask=is_row & is_in[None, :], other=0.0)
            a_part = tl.load(a, mask=is_rank & is_in[:, None], other=0.0)
        if IN_FLOAT32:
            sums = tl.dot(x_part.to(tl.float32), a_part.to(tl.float32), sums, input_precision="ieee")
        else:
            sums = tl.dot(x_part, a_part, sums)
        x += num_splits * BLOCK_IN
        a += num_splits * BLOCK_IN
    # h [splits, pieces, slices, rows, ranks]
    h += ((split * tl.num_programs(0) + piece) * NUM_SLICES + n) * BLOCK_ROWS * max_rank
    h += tl.arange(0, BLOCK_ROWS)[:, None] * max_rank + ranks[None, :]
    tl.store(h, sums, mask=is_rank)


@triton.jit(do_not_specialize=["num_pieces", "num_splits"])
def _expand(
    y,
    y_stride,
    h,
    b,
    rank,
    scaling,
    is_affine,
    scale,
    shift,
    slice_end,
    tile_start,
    tile_end,
    first_piece,
    slot_of,
    weight_of,
    num_pieces,
    num_splits,
    num_out,
    max_rank,
    NUM_SLICES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    IS_ALIGNED: tl.constexpr,  # slices begin at multiples of 16
    PRECISION: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(tile_start + tile), tl.load(tile_end + tile)
    if start >= end:
        return
    # Find the block's slice; each slice begins with a new block.
    n, column, stop = -1, 0, 0
    slice_begin = 0
    for i in tl.static_range(NUM_SLICES):
        slice_stop = tl.load(slice_end + i)
        num_blocks = tl.cdiv(slice_stop - slice_begin, BLOCK_OUT)
        if (block >= 0) & (block < num_blocks):
            n, column, stop = i, slice_begin + block * BLOCK_OUT, slice_stop
        block -= num_blocks
        slice_begin = slice_stop
    if n < 0:
        return
    rows = start + tl.arange(0, BLOCK_ROWS)
    if IS_ALIGNED:  # written so that the compiler sees the alignment
        columns = column // 16 * 16 + tl.arange(0, BLOCK_OUT)
        stop = stop // 16 * 16
    else:
        columns = column + tl.arange(0, BLOCK_OUT)
    is_in = (columns < stop)[None, :]
    sums = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    first, behind = tl.load(first_piece + tile), tl.load(first_piece + tile + 1)
    changes = tl.load(is_affine + tl.load(slot_of + first) * NUM_SLICES + n) != 0
    renormalises = changes  # these rows have one piece
    for piece in range(first, behind):
        slot = tl.load(slot_of + piece)
        own_rank = tl.load(rank + slot * NUM_SLICES + n)
        factor = tl.load(weight_of + piece) * tl.load(scaling + slot * NUM_SLICES + n)
        changes |= own_rank > 0
        for first_rank in range(0, own_rank, BLOCK_RANK):
            ranks = first_rank + tl.arange(0, BLOCK_RANK)
            is_rank = ranks < own_rank
            own_h = h + (piece * NUM_SLICES + n) * BLOCK_ROWS * max_rank
            own_h += tl.arange(0, BLOCK_ROWS)[:, None] * max_rank + ranks[None, :]
            h_part = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
            for _ in range(num_splits):
                h_part += tl.load(own_h, mask=is_rank[None, :], other=0.0)
                own_h += num_pieces * NUM_SLICES * BLOCK_ROWS * max_rank
            own_b = b + (slot.to(tl.int64) * max_rank + ranks[:, None]) * num_out + columns[None, :]
            b_part = tl.load(own_b, mask=is_rank[:, None] & is_in, other=0.0).to(tl.float32)
            sums = tl.dot(h_part * factor, b_part, sums, input_precision=PRECISION)
    if changes:
        own_y = y + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
        is_own = (rows < end)[:, None] & is_in
        sums += tl.load(own_y, mask=is_own, other=0.0).to(tl.float32)
        if renormalises:
            at = tl.load(slot_of + first).to(tl.int64) * num_out + columns
            sums = sums * tl.load(scale + at, mask=columns < stop, other=1.0)[None, :]
            sums += tl.load(shift + at, mask=columns < stop, other=0.0)[None, :]
        tl.store(own_y, sums, mask=is_own)
