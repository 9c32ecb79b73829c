"""SiLU·mul against its reference, in every version."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import close, dtypes

from lorafleet.kernels.activation import silu_mul
from lorafleet.kernels.dispatch import forced

pytestmark = pytest.mark.usefixtures("each_version")


@dtypes
@pytest.mark.parametrize("size", [1, 80, 1537])
def test_silu_mul(dtype: torch.dtype, size: int) -> None:
    x = (torch.randn(9, 2 * size) * 4).to(dtype)
    with forced(None):
        expected = silu_mul(x)
    close(silu_mul(x), expected)
