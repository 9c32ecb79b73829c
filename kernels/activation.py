"""SwiGLU's inner part (Shazeer 2020): silu(gate) · up. T rows, F features of the MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lorafleet.kernels.native import DTYPE_CODES, library


def silu_mul(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """[T, 2F], gate in the first half of the columns → [T, F]."""
    native = library()
    if native is None or gate_up_T2F.device.type != "cpu":
        return silu_mul_reference(gate_up_T2F)
    assert gate_up_T2F.is_contiguous()
    rows, columns = gate_up_T2F.shape
    out_TF = gate_up_T2F.new_empty(rows, columns // 2)
    native.lf_silu_mul(DTYPE_CODES[gate_up_T2F.dtype], gate_up_T2F.data_ptr(), out_TF.data_ptr(), rows, columns // 2)
    return out_TF


def silu_mul_reference(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF
