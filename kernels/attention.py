"""Causal attention over paged keys and values: out = softmax(scale · q·Kᵀ + mask) · V.

One op for decode (one query per sequence), prefill and chunked prefill, in any mix per call. Query heads share
key-value heads in groups (Ainslie et al. 2023); a window limits how far back a query attends.

T rows of queries, Q = q heads · D, S sequences, P pages of the table.
"""

from __future__ import annotations

import torch

from lorafleet.kernels.dispatch import uses_triton
from lorafleet.kernels.native import DTYPE_CODES, library
from lorafleet.kernels.paged_kv import read, sizes


def paged_attention(
    q_TQ: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table_SP: torch.Tensor,
    query_start_S1: torch.Tensor,
    context_len_S: torch.Tensor,
    num_q_heads: int,
    scale: float,
    window: int = 0,
    out_TQ: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return [T, Q], contiguous, in `out_TQ` if given. q_TQ may be a view with strided rows.

    k_cache, v_cache: in the layout of paged_kv.py. page_table_SP: int32, each sequence's pages in order.
    query_start_S1: int32, sequence s has the rows [s] to [s + 1]. context_len_S: int32, keys of each sequence, this
    step's included: query i of n is at position context_len − n + i and attends to the keys up to its own position,
    with window > 0 only to the last `window` of them.
    """
    native = library()
    is_on_gpu = uses_triton(q_TQ.device)
    if native is None and not is_on_gpu:
        out = paged_attention_reference(
            q_TQ, k_cache, v_cache, page_table_SP, query_start_S1, context_len_S, num_q_heads, scale, window
        )
        return out if out_TQ is None else out_TQ.copy_(out)
    num_kv_heads, page_size, head_dim = sizes(k_cache, v_cache)
    assert q_TQ.stride(1) == 1 and q_TQ.shape[1] == num_q_heads * head_dim and num_q_heads % num_kv_heads == 0
    assert q_TQ.dtype == k_cache.dtype == v_cache.dtype and k_cache.is_contiguous() and v_cache.is_contiguous()
    assert page_table_SP.dtype == query_start_S1.dtype == context_len_S.dtype == torch.int32
    assert page_table_SP.stride(1) == 1 and head_dim <= 512
    if out_TQ is None:
        out_TQ = q_TQ.new_empty(q_TQ.shape)
    assert out_TQ.is_contiguous() and out_TQ.dtype == q_TQ.dtype
    if is_on_gpu:
        from lorafleet.kernels.gpu.attention import paged_attention as on_gpu

        on_gpu(
            q_TQ,
            k_cache,
            v_cache,
            page_table_SP,
            query_start_S1,
            context_len_S,
            num_q_heads,
            scale,
            window,
            out_TQ,
        )
        return out_TQ
    native.lf_paged_attention(
        DTYPE_CODES[q_TQ.dtype],
        q_TQ.data_ptr(),
        q_TQ.stride(0),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        page_table_SP.data_ptr(),
        page_table_SP.stride(0),
        query_start_S1.data_ptr(),
        context_len_S.data_ptr(),
        out_TQ.data_ptr(),
        context_len_S.shape[0],
        num_q_heads,
        num_kv_heads,
        head_dim,
        page_size,
        scale,
        window,
    )
    return out_TQ


def paged_attention_reference(
    q_TQ: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table_SP: torch.Tensor,
    query_start_S1: torch.Tensor,
    context_len_S: torch.Tensor,
    num_q_heads: int,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """Compute sequence by sequence, in float32. Defines the correct result."""
    num_kv_heads, page_size, head_dim = sizes(k_cache, v_cache)
    out_TQ = q_TQ.new_empty(q_TQ.shape)
    starts = query_start_S1.tolist()
    for s, context in enumerate(context_len_S.tolist()):
        rows = slice(starts[s], starts[s + 1])
        pages = page_table_SP[s, : -(-context // page_size)].long()
        q = q_TQ[rows].unflatten(1, (num_q_heads, head_dim)).transpose(0, 1).float()
        keys, values = (
            tensor[:, :context].float().repeat_interleave(num_q_heads // num_kv_heads, dim=0)
            for tensor in read(k_cache, v_cache, pages)
        )
        key_position = torch.arange(context, device=q.device)[None, :]
        query_position = torch.arange(context - q.shape[1], context, device=q.device)[:, None]
        hidden = key_position > query_position
        if window > 0:
            hidden |= key_position <= query_position - window
        scores = (q @ keys.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        out_TQ[rows] = (scores.softmax(dim=-1) @ values).transpose(0, 1).flatten(1).to(out_TQ.dtype)
    return out_TQ
