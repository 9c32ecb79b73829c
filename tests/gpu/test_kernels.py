"""Triton's kernels against the references, on a GPU. LoRA and sampling: tests/kernels/gpu, which run here, too."""

from __future__ import annotations

import pytest
import torch
from attention_case import attention_case
from kernel_checks import close, dtypes

from lorafleet.kernels import paged_kv
from lorafleet.kernels.activation import silu_mul
from lorafleet.kernels.attention import paged_attention
from lorafleet.kernels.dispatch import forced
from lorafleet.kernels.norm import fused_add_rms_norm_, rms_norm
from lorafleet.kernels.rope import rope_kv_write_

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
DEVICE = torch.device("cuda")


@dtypes
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim"), [(32, 8, 128), (32, 32, 128), (9, 3, 64), (3, 3, 40)])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 1), (1, 4000), (1, 17), (1, 700)],
        [(1, context) for context in range(1, 130)],
        [(1, 1), (37, 37), (300, 900), (1, 65), (1, 2000)],
        [(2048, 2048)],
    ],
    ids=["decode", "many", "mixed", "prompt"],
)
def test_attention(
    lengths: list[tuple[int, int]], q_heads: int, kv_heads: int, dim: int, window: int, dtype: torch.dtype
) -> None:
    with forced("triton"):
        case = attention_case(lengths, q_heads, kv_heads, dim, 16, dtype)
    q, keys, values, table, starts, contexts = (tensor.to(DEVICE) for tensor in case)

    def attend() -> torch.Tensor:
        return paged_attention(q, keys, values, table, starts, contexts, q_heads, dim**-0.5, window)

    ours = attend()
    with forced(None):
        close(ours, attend())


@dtypes
def test_norms_and_activation(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 70, 4096, device=DEVICE).to(dtype)
    weights, which = torch.randn(3, 4096, device=DEVICE).to(dtype), torch.randint(3, (70,), device=DEVICE).int()
    for chosen in (None, which):
        ours, summed = x.clone(), residual.clone()
        fused_add_rms_norm_(ours, summed, weights, 1e-5, chosen)
        normed, activated = rms_norm(x, weights, 1e-5, which_T=chosen), silu_mul(x)
        with forced(None):
            expected, expected_sum = x.clone(), residual.clone()
            fused_add_rms_norm_(expected, expected_sum, weights, 1e-5, chosen)
            close(ours, expected)
            close(summed, expected_sum)
            close(normed, rms_norm(x, weights, 1e-5, which_T=chosen))
            close(activated, silu_mul(x))


@dtypes
@pytest.mark.parametrize("num_norms", [0, 4])
def test_rope_and_kv_write(num_norms: int, dtype: torch.dtype) -> None:
    rows, q_heads, kv_heads, dim, page = 300, 32, 8, 128, 16
    qkv = torch.randn(rows, (q_heads + 2 * kv_heads) * dim, device=DEVICE).to(dtype)
    angles = torch.rand(4096, dim // 2, device=DEVICE) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions, slots = torch.randint(4096, (rows,), device=DEVICE), torch.randperm(40 * page, device=DEVICE)[:rows]
    q_norm, k_norm = torch.randn(2, num_norms, dim, device=DEVICE).to(dtype) if num_norms else (None, None)
    which = torch.randint(num_norms, (rows,), device=DEVICE).int() if num_norms else None
    results = []
    for version in ("triton", None):
        own, (keys, values) = qkv.clone(), paged_kv.empty(40, kv_heads, page, dim, dtype, DEVICE)
        with forced("triton"):
            keys, values = paged_kv.empty(40, kv_heads, page, dim, dtype, DEVICE)
        keys.zero_(), values.zero_()
        with forced("triton" if version else None):
            rope_kv_write_(own, cos_sin, positions, keys, values, slots, q_heads, kv_heads, q_norm, k_norm, 1e-6, which)
        results.append((own, keys, values))
    for ours, expected in zip(*results, strict=True):
        close(ours, expected)
