"""RMSNorm in Triton: one program per row. See kernels/norm.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def rms_norm(
    x_TH: torch.Tensor, weight_WH: torch.Tensor, eps: float, out_TH: torch.Tensor, which_T: torch.Tensor | None
) -> None:
    rows, size = x_TH.shape
    if rows:
        _rms_norm[(rows,)](x_TH, x_TH, weight_WH, which_T, out_TH, eps, size, ADDS=False, **_launch(size))


def fused_add_rms_norm_(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_WH: torch.Tensor, eps: float, which_T: torch.Tensor | None
) -> None:
    rows, size = x_TH.shape
    if rows:
        _rms_norm[(rows,)](x_TH, residual_TH, weight_WH, which_T, x_TH, eps, size, ADDS=True, **_launch(size))


def _launch(size: int) -> dict[str, int]:
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512)), "enable_fp_fusion": True}


@triton.jit
def _rms_norm(x, residual, weight, which, out, eps, size, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_in = columns < size
    values = tl.load(x + row * size + columns, mask=is_in, other=0.0)
    if ADDS:
        values = values.to(tl.float32) + tl.load(residual + row * size + columns, mask=is_in, other=0.0).to(tl.float32)
        values = values.to(residual.dtype.element_ty)  # normalise the rounded value that later layers see
        tl.store(residual + row * size + columns, values, mask=is_in)
    values = values.to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values) / size + eps)
    if which is not None:
        weight += tl.load(which + row).to(tl.int64) * size
    scale = tl.load(weight + columns, mask=is_in, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, values.to(out.dtype.element_ty).to(tl.float32) * scale, mask=is_in)
