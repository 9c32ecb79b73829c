"""Rotary position embedding (Su et al. 2021) on fused q,k,v rows, and the write of k and v into the paged cache.

For each head x of q and k, with halves (a, b) and the position's angles θ: (a·cos θ − b·sin θ, b·cos θ + a·sin θ), the
half-split convention of transformers. With norms given (Qwen3) each head is RMS-normalised first; if rows have their
own norms, `which_T` has each row's index, as in norm.py.

T rows, E = (q heads + 2·kv heads)·D, M positions, D head dim, W weights of a norm.
"""

from __future__ import annotations

import torch

from lorafleet.kernels.dispatch import uses_triton
from lorafleet.kernels.native import DTYPE_CODES, library
from lorafleet.kernels.norm import rms_norm_reference
from lorafleet.kernels.paged_kv import sizes, write_


def rope_kv_write_(
    qkv_TE: torch.Tensor,
    cos_sin_MD: torch.Tensor,
    positions_T: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    q_norm_WD: torch.Tensor | None = None,
    k_norm_WD: torch.Tensor | None = None,
    eps: float = 0.0,
    which_T: torch.Tensor | None = None,
) -> None:
    """Rotate q and k in place, then write k and v.

    cos_sin_MD: float32, cosines in the first half of the columns. k_cache, v_cache: in the layout of paged_kv.py.
    slot_mapping_T: int64, page · page size + offset of each row.
    """
    arguments = (
        qkv_TE,
        cos_sin_MD,
        positions_T,
        k_cache,
        v_cache,
        slot_mapping_T,
        num_q_heads,
        num_kv_heads,
        q_norm_WD,
        k_norm_WD,
        eps,
        which_T,
    )
    native = library()
    is_on_gpu = uses_triton(qkv_TE.device)
    if native is None and not is_on_gpu:
        _reference_(*arguments)
        return
    _, page_size, head_dim = sizes(k_cache, v_cache)
    assert qkv_TE.stride(1) == 1 and qkv_TE.shape[1] == (num_q_heads + 2 * num_kv_heads) * head_dim
    assert qkv_TE.dtype == k_cache.dtype == v_cache.dtype and k_cache.is_contiguous() and v_cache.is_contiguous()
    assert cos_sin_MD.dtype == torch.float32 and cos_sin_MD.is_contiguous() and head_dim <= 512
    assert positions_T.dtype == slot_mapping_T.dtype == torch.int64
    assert which_T is None or which_T.dtype == torch.int32
    assert all(norm is None or norm.is_contiguous() for norm in (q_norm_WD, k_norm_WD))
    if is_on_gpu:
        from lorafleet.kernels.gpu.rope import rope_kv_write_ as on_gpu

        on_gpu(*arguments)
        return
    native.lf_rope_kv_write(
        DTYPE_CODES[qkv_TE.dtype],
        qkv_TE.data_ptr(),
        qkv_TE.stride(0),
        cos_sin_MD.data_ptr(),
        positions_T.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slot_mapping_T.data_ptr(),
        qkv_TE.shape[0],
        num_q_heads,
        num_kv_heads,
        head_dim,
        page_size,
        None if q_norm_WD is None else q_norm_WD.data_ptr(),
        None if k_norm_WD is None else k_norm_WD.data_ptr(),
        None if which_T is None else which_T.data_ptr(),
        eps,
    )


def _reference_(
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
    head_dim = v_cache.shape[3]
    heads = qkv_TE.unflatten(1, (num_q_heads + 2 * num_kv_heads, head_dim))
    q, k, v = heads.split([num_q_heads, num_kv_heads, num_kv_heads], dim=1)
    cos, sin = cos_sin_MD[positions_T][:, None, :].chunk(2, dim=-1)
    for x, norm in ((q, q_norm_WD), (k, k_norm_WD)):
        a, b = (x if norm is None else rms_norm_reference(x, norm, eps, which_T)).float().chunk(2, dim=-1)
        x.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))
    write_(k_cache, v_cache, slot_mapping_T, k, v)
