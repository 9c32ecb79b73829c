"""Attention over pages in Triton. See kernels/attention.py.

A tile's rows are the queries of the heads that share one key-value head, so that each key is read once for all of them.
Each row keeps its largest score so far, the sum of the powers and the values weighted by them; both products run on the
tile (FlashAttention-2, Dao 2023).

A decode step has few rows and long contexts, so contexts are split into parts, one program each, and a second kernel
merges them (Flash-Decoding, Dao et al. 2023). The host does not know the lengths: a step may be recorded once and
replayed with other lengths. It launches as many programs as the batch can need, and each program derives its part from
the lengths: every sequence has one part per `part_size` keys or fraction of it, and the parts are numbered
consecutively. So the programs have similar amounts of work, however unequal the contexts are.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from lorafleet.kernels.gpu.device import num_multiprocessors
from lorafleet.kernels.paged_kv import sizes

_DECODES_EACH = 3  # decode programs that a multiprocessor holds at once, limited by shared memory
_BLOCK_BYTES = 16384  # of keys that a decode step multiplies at once, and the same of values
_BYTES_AHEAD = 65536  # of keys and values that a decode step prefetches


def paged_attention(
    q_TQ: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table_SP: torch.Tensor,
    query_start_S1: torch.Tensor,
    context_len_S: torch.Tensor,
    num_q_heads: int,
    scale: float,
    window: int,
    out_TQ: torch.Tensor,
) -> None:
    assert scale > 0, "the maximum is taken before scaling"
    num_seqs, num_rows = context_len_S.shape[0], q_TQ.shape[0]
    if not num_seqs:
        return
    num_kv_heads, page_size, head_dim = sizes(k_cache, v_cache)
    group = num_q_heads // num_kv_heads
    block_d = max(16, triton.next_power_of_2(head_dim))
    element_size = q_TQ.element_size()
    scale *= math.log2(math.e)  # the kernels use powers of 2
    constants = {
        "HEAD_DIM": head_dim,
        "PAGE_SIZE": page_size,
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "IS_WINDOWED": window > 0,
        # Triton's interpreter multiplies the bits of bfloat16.
        "IN_FLOAT32": element_size == 4 or triton.knobs.runtime.interpret,
        "BLOCK_D": block_d,
        "enable_fp_fusion": True,
    }
    if num_rows > num_seqs:
        room = _shared_memory(q_TQ.device)
        tile = _prefill_tile(block_d, element_size, num_rows // num_seqs * group, window > 0, room)
        heads = min(group, tile["BLOCK_M"])
        num_blocks = num_rows // (tile["BLOCK_M"] // heads) + num_seqs
        _prefill[(num_blocks, num_kv_heads * triton.cdiv(group, heads))](
            q_TQ,
            q_TQ.stride(0),
            k_cache,
            v_cache,
            page_table_SP,
            page_table_SP.stride(0),
            query_start_S1,
            context_len_S,
            num_seqs,
            scale,
            window,
            out_TQ,
            HEADS=heads,
            **tile,
            **constants,
        )
        return
    tile = _decode_tile(block_d, element_size, group)
    heads = min(group, tile["BLOCK_M"])
    spare_parts = max(1, _DECODES_EACH * num_multiprocessors(q_TQ.device) // num_kv_heads)
    num_parts = num_seqs + spare_parts
    values = torch.empty(num_parts, num_q_heads, head_dim, dtype=torch.float32, device=q_TQ.device)
    weights = torch.empty(num_parts, num_q_heads, 2, dtype=torch.float32, device=q_TQ.device)
    _decode[(num_parts, num_kv_heads * triton.cdiv(group, heads))](
        q_TQ,
        q_TQ.stride(0),
        k_cache,
        v_cache,
        page_table_SP,
        page_table_SP.stride(0),
        context_len_S,
        num_seqs,
        spare_parts,
        scale,
        window,
        values,
        weights,
        out_TQ,
        HEADS=heads,
        **tile,
        **constants,
    )
    _merge[(num_seqs, num_q_heads)](
        values,
        weights,
        context_len_S,
        num_seqs,
        spare_parts,
        window,
        out_TQ,
        HEAD_DIM=head_dim,
        IS_WINDOWED=window > 0,
        BLOCK_D=block_d,
        BLOCK_N=tile["BLOCK_N"],
        BLOCK_PARTS=min(64, 8192 // block_d),
        num_warps=4,
        enable_fp_fusion=True,
    )


# Tiles are as large as the registers of sm_90 allow, but for a few bytes per thread (tests/compile_kernels.py prints
# the usage). Products of float32 do not use the tensor cores and hold whole rows in registers.


def _decode_tile(block_d: int, element_size: int, group: int) -> dict[str, int]:
    row_bytes = block_d * element_size
    if element_size == 4:
        block_m = block_n = 16
    else:
        block_m = 16 if group <= 16 else 32
        block_n = max(16, min(64, _BLOCK_BYTES // row_bytes))
    num_stages = min(5, max(3, 1 + _BYTES_AHEAD // (2 * block_n * row_bytes)))
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": num_stages}


def _prefill_tile(block_d: int, element_size: int, seq_rows: int, is_windowed: bool, room: int) -> dict[str, int]:
    """seq_rows: rows of the average sequence. room: bytes of shared memory."""
    if element_size == 4:
        block_m, block_n, num_warps = (64, 32, 8) if block_d <= 64 else (16, 16, 4)
    elif block_d <= 128:
        block_m, block_n, num_warps = (64, 64, 4) if seq_rows <= 64 else (128, 64 if is_windowed else 128, 8)
    else:
        block_m, block_n, num_warps = (128, 32, 8) if block_d == 256 else (32, 16, 4)
    num_stages = 3  # with fewer, Triton requests a block's keys only after the previous block
    while block_n > 16 and (block_m + num_stages * 2 * block_n) * block_d * element_size > room:
        block_n //= 2
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Return the shared memory per program in bytes; without a GPU, an H100's."""
    if device.type != "cuda":
        return 227 << 10
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


_BLOCK_SEQS = tl.constexpr(128)
_MIN_PART_BLOCKS = tl.constexpr(4)  # fewer would cost more to start and merge than they save
_NO_SCORE = tl.constexpr(-1e30)  # not -infinity, whose differences are NaN


@triton.jit
def _num_keys(context_len, first_seq, num_seqs, window, IS_WINDOWED: tl.constexpr):
    """Return the keys visible to the last query, for _BLOCK_SEQS sequences; 0 after the last sequence."""
    seq = first_seq + tl.arange(0, _BLOCK_SEQS)
    num_keys = tl.load(context_len + seq, mask=seq < num_seqs, other=0)
    if IS_WINDOWED:
        num_keys = tl.minimum(num_keys, window)
    return num_keys


@triton.jit
def _part_size(context_len, num_seqs, spare_parts, window, IS_WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the maximum keys of a part, in whole blocks, so that there are fewer than num_seqs + spare_parts parts."""
    total = 0
    for first_seq in range(0, num_seqs, _BLOCK_SEQS):
        total += tl.sum(_num_keys(context_len, first_seq, num_seqs, window, IS_WINDOWED))
    return tl.maximum(tl.cdiv(tl.cdiv(total, spare_parts), BLOCK_N), _MIN_PART_BLOCKS) * BLOCK_N


@triton.jit
def _attend(
    q,
    k_head,
    v_head,
    pages,
    first,
    stop,
    limit,
    last_key,
    window,
    scale,
    largest,
    total,
    values,
    IS_MASKED: tl.constexpr,
    IS_WINDOWED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the keys from `first` on to the rows' results, in blocks until one reaches `stop`.

    No key at or after `limit` is read. With IS_MASKED a block may extend past it, and a row sees the keys up to its
    `last_key`, with IS_WINDOWED only the last `window` of these; otherwise it sees all.
    """
    column = tl.arange(0, BLOCK_D)
    # A block's pages are looked up during the computation of the block before, so that its keys are requested early,
    # too. Positions are unsigned, so that the division is a shift.
    next_key = first + tl.arange(0, BLOCK_N)
    next_page = tl.load(pages + next_key.to(tl.uint32) // PAGE_SIZE, mask=next_key < limit, other=0)
    for start in range(first, stop, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        page = next_page.to(tl.int64)
        next_key = key + BLOCK_N
        next_page = tl.load(pages + next_key.to(tl.uint32) // PAGE_SIZE, mask=next_key < limit, other=0)
        place = page * (NUM_KV_HEADS * PAGE_SIZE * HEAD_DIM) + key.to(tl.uint32) % PAGE_SIZE * HEAD_DIM
        place = place[:, None] + column[None, :]
        # Keys that no row sees are not read: they may be NaN, and a NaN value times weight 0 is NaN.
        if IS_MASKED:
            is_in = (key < limit)[:, None] & (column < HEAD_DIM)[None, :]
            k = tl.load(k_head + place, mask=is_in, other=0.0)
            v = tl.load(v_head + place, mask=is_in, other=0.0)
        elif HEAD_DIM < BLOCK_D:
            is_in = (column < HEAD_DIM)[None, :]
            k = tl.load(k_head + place, mask=is_in, other=0.0)
            v = tl.load(v_head + place, mask=is_in, other=0.0)
        else:
            k = tl.load(k_head + place)
            v = tl.load(v_head + place)
        if IN_FLOAT32:
            scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
        else:
            scores = tl.dot(q, tl.trans(k))
        if IS_MASKED:
            is_seen = key[None, :] <= last_key[:, None]
            if IS_WINDOWED:
                is_seen &= key[None, :] > last_key[:, None] - window
            scores = tl.where(is_seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1) * scale)
        powers = tl.exp2(scores * scale - new_largest[:, None])
        decay = tl.exp2(largest - new_largest)
        largest = new_largest
        total = total * decay + tl.sum(powers, axis=1)
        powers = powers.to(v.dtype)
        if IN_FLOAT32:
            product = tl.dot(powers.to(tl.float32), v.to(tl.float32), values * decay[:, None], input_precision="ieee")
        else:
            product = tl.dot(powers, v, values * decay[:, None])
        values = product
    return largest, total, values


@triton.jit(
    do_not_specialize=["table_stride", "num_seqs", "spare_parts", "window"],
    do_not_specialize_on_alignment=["page_table", "context_len"],
)
def _decode(
    q,
    row_stride,
    k_cache,
    v_cache,
    page_table,
    table_stride,
    context_len,
    num_seqs,
    spare_parts,
    scale,
    window,
    part_values,
    part_weights,
    out,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,  # heads per tile
    IS_WINDOWED: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    part = tl.program_id(0)
    TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tl.program_id(1) // TILES
    part_size = _part_size(context_len, num_seqs, spare_parts, window, IS_WINDOWED, BLOCK_N)
    seq, first_part, num_parts = 0, 0, 0  # sequences and parts before this one; `first_part`: the sequence's first
    for first_seq in range(0, num_seqs, _BLOCK_SEQS):
        own = tl.cdiv(_num_keys(context_len, first_seq, num_seqs, window, IS_WINDOWED), part_size)
        end = num_parts + tl.cumsum(own, 0)
        is_before = end <= part
        seq += tl.sum(is_before.to(tl.int32))
        first_part = tl.maximum(first_part, tl.max(tl.where(is_before, end, 0)))
        num_parts += tl.sum(own)
    if part >= num_parts:
        return
    context = tl.load(context_len + seq)
    num_keys = context
    if IS_WINDOWED:
        num_keys = tl.minimum(num_keys, window)
    own_parts = tl.cdiv(num_keys, part_size)
    # The sequence's parts are equal, in whole blocks. As none is longer than part_size, the last one is never empty.
    size = tl.cdiv(tl.cdiv(num_keys, own_parts), BLOCK_N) * BLOCK_N
    first = context - num_keys + (part - first_part) * size
    stop = tl.minimum(first + size, context)

    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    head_in_group = tl.program_id(1) % TILES * HEADS + row
    is_head = (row < HEADS) & (head_in_group < GROUP)
    head = kv_head * GROUP + head_in_group
    is_in = is_head[:, None] & (column < HEAD_DIM)[None, :]
    place = head[:, None] * HEAD_DIM + column[None, :]
    largest, total, values = _attend(
        tl.load(q + tl.cast(seq, tl.int64) * row_stride + place, mask=is_in, other=0.0),
        k_cache + kv_head * (PAGE_SIZE * HEAD_DIM),
        v_cache + kv_head * (PAGE_SIZE * HEAD_DIM),
        page_table + tl.cast(seq, tl.int64) * table_stride,
        first,
        stop,
        stop,
        tl.zeros([BLOCK_M], tl.int32) + (stop - 1),
        window,
        scale,
        tl.full([BLOCK_M], _NO_SCORE, tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
        IS_MASKED=True,
        IS_WINDOWED=False,
        HEAD_DIM=HEAD_DIM,
        PAGE_SIZE=PAGE_SIZE,
        NUM_KV_HEADS=NUM_KV_HEADS,
        IN_FLOAT32=IN_FLOAT32,
        BLOCK_D=BLOCK_D,
        BLOCK_N=BLOCK_N,
    )
    if own_parts == 1:
        values /= total[:, None]
        out += tl.cast(seq, tl.int64) * (NUM_KV_HEADS * GROUP * HEAD_DIM)
        tl.store(out + place, values.to(out.dtype.element_ty), mask=is_in)
    else:
        heads = part.to(tl.int64) * (NUM_KV_HEADS * GROUP)
        tl.store(part_values + heads * HEAD_DIM + place, values, mask=is_in)
        tl.store(part_weights + (heads + head) * 2, largest, mask=is_head)
        tl.store(part_weights + (heads + head) * 2 + 1, total, mask=is_head)


@triton.jit(
    do_not_specialize=["num_seqs", "spare_parts", "window"],
    do_not_specialize_on_alignment=["context_len"],
)
def _merge(
    part_values,
    part_weights,
    context_len,
    num_seqs,
    spare_parts,
    window,
    out,
    HEAD_DIM: tl.constexpr,
    IS_WINDOWED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    seq, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    part_size = _part_size(context_len, num_seqs, spare_parts, window, IS_WINDOWED, BLOCK_N)
    num_keys = tl.load(context_len + seq)
    if IS_WINDOWED:
        num_keys = tl.minimum(num_keys, window)
    own_parts = tl.cdiv(num_keys, part_size)
    if own_parts == 1:
        return
    first_part = 0
    for first_seq in range(0, seq, _BLOCK_SEQS):
        first_part += tl.sum(tl.cdiv(_num_keys(context_len, first_seq, seq, window, IS_WINDOWED), part_size))
    column = tl.arange(0, BLOCK_D)
    largest = tl.full([], _NO_SCORE, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    values = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, own_parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        is_part = part < own_parts
        place = (first_part + part).to(tl.int64) * num_heads + head
        is_in = is_part[:, None] & (column < HEAD_DIM)[None, :]
        tile = tl.load(part_values + place[:, None] * HEAD_DIM + column[None, :], mask=is_in, other=0.0)
        part_largest = tl.load(part_weights + place * 2, mask=is_part, other=_NO_SCORE)
        part_total = tl.load(part_weights + place * 2 + 1, mask=is_part, other=0.0)
        new_largest = tl.maximum(largest, tl.max(part_largest))
        weight = tl.exp2(part_largest - new_largest)
        decay = tl.exp2(largest - new_largest)
        largest = new_largest
        total = total * decay + tl.sum(weight * part_total)
        values = values * decay + tl.sum(weight[:, None] * tile, axis=0)
    out += (tl.cast(seq, tl.int64) * num_heads + head) * HEAD_DIM
    tl.store(out + column, (values / total).to(out.dtype.element_ty), mask=column < HEAD_DIM)


@triton.jit(
    do_not_specialize=["table_stride", "num_seqs", "window"],
    do_not_specialize_on_alignment=["page_table", "query_start", "context_len"],
)
def _prefill(
    q,
    row_stride,
    k_cache,
    v_cache,
    page_table,
    table_stride,
    query_start,
    context_len,
    num_seqs,
    scale,
    window,
    out,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,  # heads per tile
    IS_WINDOWED: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // HEADS
    TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    # A sequence's last block has the most keys. The longest blocks start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1) // TILES
    # A sequence's blocks begin at query_start // BLOCK_Q + seq and end where the next sequence's begin: as many as it
    # needs, or one more.
    seq = -1
    for first_seq in range(0, num_seqs, _BLOCK_SEQS):
        ids = first_seq + tl.arange(0, _BLOCK_SEQS)
        starts = tl.load(query_start + ids, mask=ids < num_seqs, other=0)
        seq += tl.sum(((ids < num_seqs) & (starts // BLOCK_Q + ids <= block)).to(tl.int32))
    start = tl.load(query_start + seq)
    num_queries = tl.load(query_start + seq + 1) - start
    first_query = (block - (start // BLOCK_Q + seq)) * BLOCK_Q
    if first_query >= num_queries:
        return
    before = tl.load(context_len + seq) - num_queries  # the first query's position
    limit = before + tl.minimum(first_query + BLOCK_Q, num_queries)

    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    query = first_query + row // HEADS
    head_in_group = tl.program_id(1) % TILES * HEADS + row % HEADS
    is_row = (row < BLOCK_Q * HEADS) & (query < num_queries) & (head_in_group < GROUP)
    last_key = tl.minimum(before + query, limit - 1)
    is_in = is_row[:, None] & (column < HEAD_DIM)[None, :]
    place = (kv_head * GROUP + head_in_group)[:, None] * HEAD_DIM + column[None, :]
    q_row = (start + query).to(tl.int64)
    q_tile = tl.load(q + q_row[:, None] * row_stride + place, mask=is_in, other=0.0)
    k_head = k_cache + kv_head * (PAGE_SIZE * HEAD_DIM)
    v_head = v_cache + kv_head * (PAGE_SIZE * HEAD_DIM)
    pages = page_table + tl.cast(seq, tl.int64) * table_stride
    largest = tl.full([BLOCK_M], _NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    values = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if IS_WINDOWED:
        first = tl.maximum(before + first_query + 1 - window, 0)
    else:
        first = (before + first_query + 1) // BLOCK_N * BLOCK_N  # all rows see all keys before it
        largest, total, values = _attend(
            q_tile,
            k_head,
            v_head,
            pages,
            0,
            first,
            first,
            last_key,
            window,
            scale,
            largest,
            total,
            values,
            IS_MASKED=False,
            IS_WINDOWED=False,
            HEAD_DIM=HEAD_DIM,
            PAGE_SIZE=PAGE_SIZE,
            NUM_KV_HEADS=NUM_KV_HEADS,
            IN_FLOAT32=IN_FLOAT32,
            BLOCK_D=BLOCK_D,
            BLOCK_N=BLOCK_N,
        )
    largest, total, values = _attend(
        q_tile,
        k_head,
        v_head,
        pages,
        first,
        limit,
        limit,
        last_key,
        window,
        scale,
        largest,
        total,
        values,
        IS_MASKED=True,
        IS_WINDOWED=IS_WINDOWED,
        HEAD_DIM=HEAD_DIM,
        PAGE_SIZE=PAGE_SIZE,
        NUM_KV_HEADS=NUM_KV_HEADS,
        IN_FLOAT32=IN_FLOAT32,
        BLOCK_D=BLOCK_D,
        BLOCK_N=BLOCK_N,
    )
    values /= total[:, None]
    place += q_row[:, None] * (NUM_KV_HEADS * GROUP * HEAD_DIM)
    tl.store(out + place, values.to(out.dtype.element_ty), mask=is_in)
