"""Comparisons for tests of the kernels, on a CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch

from lorafleet.kernels import paged_kv
from lorafleet.kernels.dispatch import uses_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (absolute, relative); the 16-bit ones allow one rounding more or less than the reference has.
TOLERANCE = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (2e-2, 2e-2), torch.float16: (3e-3, 3e-3)}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    atol, rtol = TOLERANCE[expected.dtype]
    if expected.dtype == torch.bfloat16 and expected.device.type == "cpu" and uses_triton(expected.device):
        atol, rtol = 2 * atol, 2 * rtol  # Triton's interpreter truncates where hardware rounds to nearest
    torch.testing.assert_close(ours, expected, atol=atol, rtol=rtol, equal_nan=True)


def empty_pages(
    num_pages: int, kv_heads: int, page: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of pages without any write: all NaN."""
    keys, values = paged_kv.empty(num_pages, kv_heads, page, dim, dtype, torch.device("cpu"))
    return keys.fill_(torch.nan), values.fill_(torch.nan)
