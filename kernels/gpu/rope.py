"""RoPE and the write of keys and values in Triton: one program per row and head. See kernels/rope.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorafleet.kernels.paged_kv import sizes


def rope_kv_write_(
    qkv_TE: torch.Tensor,
    cos_sin_MD: torch.Tensor,
    positions_T: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    q_norm_WD: torch.Tensor | None,
    k_norm_WD: torch.Tensor | None,
    eps: float,
    which_T: torch.Tensor | None,
) -> None:
    _, page_size, head_dim = sizes(k_cache, v_cache)
    rows = qkv_TE.shape[0]
    if not rows:
        return
    _rope_kv_write[(rows, num_q_heads + 2 * num_kv_heads)](
        qkv_TE,
        qkv_TE.stride(0),
        cos_sin_MD,
        positions_T,
        k_cache,
        v_cache,
        slot_mapping_T,
        q_norm_WD,
        k_norm_WD,
        which_T,
        eps,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        NUM_Q_HEADS=num_q_heads,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
        enable_fp_fusion=True,
    )


@triton.jit
def _rope_kv_write(
    qkv,
    row_stride,
    cos_sin,
    positions,
    k_cache,
    v_cache,
    slot_mapping,
    q_norm,
    k_norm,
    which,
    eps,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least half of a head
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    columns = tl.arange(0, BLOCK)
    is_in = columns < HALF
    own = qkv + row * row_stride + head * HEAD_DIM
    first = tl.load(own + columns, mask=is_in, other=0.0)
    second = tl.load(own + HALF + columns, mask=is_in, other=0.0)
    is_query = head < NUM_Q_HEADS
    is_value = head >= NUM_Q_HEADS + NUM_KV_HEADS
    if not is_value:
        a, b = first.to(tl.float32), second.to(tl.float32)
        if q_norm is not None:
            scale = tl.rsqrt((tl.sum(a * a) + tl.sum(b * b)) / HEAD_DIM + eps)
            weight = q_norm if is_query else k_norm
            if which is not None:
                weight += tl.load(which + row).to(tl.int64) * HEAD_DIM
            # Rounded before and after the product with the weight, as in kernels/norm.py.
            a = (a * scale).to(first.dtype).to(tl.float32)
            b = (b * scale).to(first.dtype).to(tl.float32)
            a = (a * tl.load(weight + columns, mask=is_in, other=0.0).to(tl.float32)).to(first.dtype).to(tl.float32)
            b = (
                (b * tl.load(weight + HALF + columns, mask=is_in, other=0.0).to(tl.float32))
                .to(first.dtype)
                .to(tl.float32)
            )
        angles = cos_sin + tl.load(positions + row) * HEAD_DIM
        cos = tl.load(angles + columns, mask=is_in, other=0.0)
        sin = tl.load(angles + HALF + columns, mask=is_in, other=0.0)
        first = (a * cos - b * sin).to(first.dtype)
        second = (b * cos + a * sin).to(second.dtype)
        tl.store(own + columns, first, mask=is_in)
        tl.store(own + HALF + columns, second, mask=is_in)
    if not is_query:
        slot = tl.load(slot_mapping + row)
        kv_head = head - NUM_Q_HEADS - NUM_KV_HEADS * is_value.to(tl.int32)
        place = ((slot // PAGE_SIZE * NUM_KV_HEADS + kv_head) * PAGE_SIZE + slot % PAGE_SIZE) * HEAD_DIM
        cache = v_cache if is_value else k_cache
        tl.store(cache + place + columns, first, mask=is_in)
        tl.store(cache + place + HALF + columns, second, mask=is_in)
