"""SwiGLU's inner part (Shazeer 2020): silu(gate) · up. T rows, F features of the MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lorafleet.kernels.dispatch import uses_triton
from lorafleet.kernels.native import DTYPE_CODES, library


def silu_mul(gate_up_T2F: torch.Tensor, out_TF: torch.Tensor | None = None) -> torch.Tensor:
    """Compute [T, 2F], with gate in the first half of the columns, to [T, F], in `out_TF` if given."""
    native = library()
    is_on_gpu = uses_triton(gate_up_T2F.device)
    if native is None and not is_on_gpu:
        out = silu_mul_reference(gate_up_T2F)
        return out if out_TF is None else out_TF.copy_(out)
    rows, columns = gate_up_T2F.shape
    if out_TF is None:
        out_TF = gate_up_T2F.new_empty(rows, columns // 2)
    assert gate_up_T2F.is_contiguous() and out_TF.is_contiguous() and out_TF.dtype == gate_up_T2F.dtype
    if is_on_gpu:
        from lorafleet.kernels.gpu.activation import silu_mul as on_gpu

        on_gpu(gate_up_T2F, out_TF)
        return out_TF
    native.lf_silu_mul(DTYPE_CODES[gate_up_T2F.dtype], gate_up_T2F.data_ptr(), out_TF.data_ptr(), rows, columns // 2)
    return out_TF


def silu_mul_reference(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF
