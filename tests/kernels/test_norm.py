"""RMSNorm against its reference, in every version."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import close, dtypes

from lorafleet.kernels.dispatch import forced
from lorafleet.kernels.norm import fused_add_rms_norm_, rms_norm

pytestmark = pytest.mark.usefixtures("each_version")


@dtypes
@pytest.mark.parametrize("size", [1, 16, 48, 577])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_norms(dtype: torch.dtype, rows: int, size: int) -> None:
    x, residual = torch.randn(rows, size).to(dtype), torch.randn(rows, size).to(dtype)
    weight = torch.randn(size).to(dtype)
    with forced(None):
        expected = rms_norm(x, weight, 1e-5)
        expected_x, expected_residual = x.clone(), residual.clone()
        fused_add_rms_norm_(expected_x, expected_residual, weight, 1e-5)
    close(rms_norm(x, weight, 1e-5), expected)
    fused_add_rms_norm_(x, residual, weight, 1e-5)
    close(x, expected_x)
    close(residual, expected_residual)


@dtypes
@pytest.mark.parametrize("rows", [1, 33])
def test_norms_with_a_weight_of_each_rows_own(dtype: torch.dtype, rows: int) -> None:
    x, residual = torch.randn(rows, 49).to(dtype), torch.randn(rows, 49).to(dtype)
    weights = torch.randn(5, 49).to(dtype)
    which = torch.randint(0, 5, (rows,), dtype=torch.int32)
    ours = rms_norm(x, weights, 1e-5, which_T=which)
    ours_x, ours_residual = x.clone(), residual.clone()
    fused_add_rms_norm_(ours_x, ours_residual, weights, 1e-5, which)
    with forced(None):
        close(ours, rms_norm(x, weights, 1e-5, which_T=which))
        fused_add_rms_norm_(x, residual, weights, 1e-5, which)
    close(ours_x, x)
    close(ours_residual, residual)
    assert torch.equal(rms_norm(x, weights, 1e-5), rms_norm(x, weights[0].contiguous(), 1e-5)), "without, the first"
