"""RoPE and the write of keys and values against their reference, in every version."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import close, dtypes, empty_pages

from lorafleet.kernels.dispatch import forced
from lorafleet.kernels.paged_kv import read
from lorafleet.kernels.rope import rope_kv_write_

pytestmark = pytest.mark.usefixtures("each_version")


@dtypes
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim"), [(4, 4, 16), (9, 3, 64), (8, 1, 32), (2, 2, 128)])
@pytest.mark.parametrize("num_norms", [0, 1, 4])
def test_rope_and_kv_write(dtype: torch.dtype, q_heads: int, kv_heads: int, dim: int, num_norms: int) -> None:
    """No norms, one norm each for q and k, or one per row."""
    rows, pages, page = 21, 7, 8
    qkv = torch.randn(rows, (q_heads + 2 * kv_heads) * dim).to(dtype)
    angles = torch.rand(100, dim // 2) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions = torch.randint(0, 100, (rows,))
    slots = torch.randperm(pages * page)[:rows]
    q_norm, k_norm = torch.randn(2, num_norms, dim).to(dtype) if num_norms else (None, None)
    which = torch.randint(0, num_norms, (rows,), dtype=torch.int32) if num_norms > 1 else None

    def run() -> tuple[torch.Tensor, ...]:
        own, (keys, values) = qkv.clone(), empty_pages(pages, kv_heads, page, dim, dtype)
        rope_kv_write_(own, cos_sin, positions, keys, values, slots, q_heads, kv_heads, q_norm, k_norm, 1e-6, which)
        return own, *read(keys, values, torch.arange(pages))

    with forced(None):
        expected = run()
    for ours, wanted in zip(run(), expected, strict=True):
        close(ours, wanted)
