"""silu(gate) · up in Triton, elementwise. See kernels/activation.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def silu_mul(gate_up_T2F: torch.Tensor, out_TF: torch.Tensor) -> None:
    rows, size = out_TF.shape
    if rows:
        _silu_mul[(rows, triton.cdiv(size, _BLOCK))](gate_up_T2F, out_TF, size, BLOCK=_BLOCK, enable_fp_fusion=True)


@triton.jit
def _silu_mul(gate_up, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = columns < size
    gate_up += row * 2 * size
    gate = tl.load(gate_up + columns, mask=is_in, other=0.0).to(tl.float32)
    up = tl.load(gate_up + size + columns, mask=is_in, other=0.0).to(tl.float32)
    # The factors are rounded first, as in torch.
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + columns, silu * up, mask=is_in)
